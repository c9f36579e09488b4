# An unprivileged owner of the device whose limit on locked memory is below the guest's RAM: refused, with how much is needed.
. /causeway/files/lib.sh

guest never <<'GUEST'
echo "this guest runs"
GUEST
bind-vfio "$EDU" || fail "binding"
group=$(basename "$(readlink "/sys/bus/pci/devices/$EDU/iommu_group")")
user=1000
grep -q "^guest:" /etc/passwd 2>/dev/null || echo "guest:x:$user:$user::/:/bin/sh" >>/etc/passwd
chmod 666 /dev/kvm
chown $user "/dev/vfio/$group"
trap 'exit 143' TERM
trap 'chmod 600 /dev/kvm; chown 0 "/dev/vfio/$group"' EXIT
mkdir -p /tmp/owner
cp never.cpio /tmp/owner
chmod -R a+rX /tmp/owner

# as_owner KIBIBYTES
as_owner() {
    (
        cd /tmp/owner && ulimit -l "$1" && exec su -s /bin/sh guest -c \
            "exec causeway run --kernel $KERNEL --initrd never.cpio --cmdline '$GUEST_CMDLINE intel_iommu=off' --memory 512M \
            --timeout $LIMIT --device vfio,host=$EDU"
    ) </dev/null >owner.log 2>owner.err
    STATUS=$?
}
as_owner 65536
cat owner.err
expect "the status with 64 MiB" $STATUS 4
expect_line owner.err "memlock|ulimit|locked" "64 ?M|65536|67108864"
# What is needed is said in a form that ulimit, systemd or limits.conf takes, and it is at least the guest's RAM.
grep -oE '[0-9]+ ?([KMG]i?B?)?' owner.err | grep -qE '^(5[1-9][0-9] ?M|5[2-9][0-9]{4}|5[3-9][0-9]{7})' ||
    fail "the message does not say that 512 MiB or a little more is needed"

as_owner unlimited
expect "the status without a limit" $STATUS 0
rm -r /tmp/owner
