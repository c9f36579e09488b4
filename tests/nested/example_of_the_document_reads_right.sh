# The example of docs/nested-bench.md, word for word (a test of xtask compares them): a guest prints the checksum of the NVMe's first 64 MiB.
. /causeway/files/lib.sh

cat >example.sh <<'EXAMPLE'
#!/bin/sh
bind-vfio "$NVME" || exit 1
printf '#!/bin/sh\nwait-for /dev/nvme0n1 && dd if=/dev/nvme0n1 bs=1M count=64 2>/dev/null | sha256sum\n' >read.sh
mkinitrd read.cpio read.sh
causeway run --kernel "$KERNEL" --initrd read.cpio --cmdline "console=ttyS0 quiet intel_iommu=on" --device vfio,host="$NVME"
EXAMPLE
timeout "$(time_left)" sh example.sh </dev/null >example.log 2>&1 || fail "the example ended with status $?: $(tail -n 20 example.log)"
expect "the checksum" "$(tr -d '\r' <example.log | sed -n 's/^\([0-9a-f]\{64\}\) .*/\1/p')" "$DISK_SHA256"
