# An unprivileged owner may lock the guest's RAM and little more; the guest maps the same memory again and again for its edu, and each
# time counts. What is beyond the limit is refused like what is beyond the number of mappings, and the guest goes on (B-11).
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
guest crowded <<'GUEST'
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
echo 2 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
edu-vfio crowded 300 --huge || fail "crowded"
edu-vfio roundtrip || fail "roundtrip"
show_faults
GUEST
group=$(basename "$(readlink "/sys/bus/pci/devices/$EDU/iommu_group")")
user=1000
grep -q "^guest:" /etc/passwd 2>/dev/null || echo "guest:x:$user:$user::/:/bin/sh" >>/etc/passwd
chmod 666 /dev/kvm
chown $user "/dev/vfio/$group"
trap 'exit 143' TERM
trap 'chmod 600 /dev/kvm; chown 0 "/dev/vfio/$group"; rm -rf /tmp/owner' EXIT
mkdir -p /tmp/owner
cp crowded.cpio /tmp/owner
chmod -R a+rX /tmp/owner
chown $user /tmp/owner

mark
(
    cd /tmp/owner && ulimit -l $((320 << 10)) && exec su -s /bin/sh guest -c \
        "exec causeway run --kernel $KERNEL --initrd crowded.cpio --cmdline '$GUEST_CMDLINE intel_iommu=on' --memory 256M \
        --timeout $LIMIT --device vfio,host=$EDU --stats crowded.json"
) </dev/null >crowded.log 2>crowded.err
STATUS=$?
[ $STATUS = 0 ] && grep -q 'guest: exit 0' crowded.log || { tail -n 40 crowded.log crowded.err; fail "the guest: status $STATUS"; }
cp /tmp/owner/crowded.json .
lines crowded 'crowded: '
grep -oE '"refused_maps": *\{[^}]*\}' crowded.json
# 300 mappings of 2 MiB are asked for, and 160 of them are 320 MiB.
refused=$(field crowded.json memlock)
[ "$refused" -ge 140 ] && [ "$refused" -lt 180 ] || fail "$refused maps were refused for memlock"
expect "other refusals" "$(field crowded.json limit) $(field crowded.json range) $(field crowded.json target)" "0 0 0"
expect "quarantined" "$(field crowded.json quarantined)" 0
lines crowded 'guest-fault: ' >faults
cat faults
expect "fault lines in the guest's log" "$(grep -c 'Request device' faults)" 1
grep WARN crowded.err
expect "warnings about memlock" "$(grep -c 'lock no more memory' crowded.err)" 1
expect_line crowded.err "lock no more memory.*ulimit -l"
