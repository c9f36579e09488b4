# An unprivileged owner of the device whose limit on locked memory is below the guest's RAM: refused, with how much is needed.
. /causeway/files/lib.sh

guest never <<'GUEST'
echo "this guest runs"
GUEST
bind-vfio "$EDU" || fail "binding"
owner_of "$EDU" never.cpio

with_limit() { as_owner "$1" never intel_iommu=off --memory 512M --device vfio,host="$EDU"; }
with_limit 65536
cat never.err
expect "the status with 64 MiB" $STATUS 4
expect_line never.err "memlock|ulimit|locked" "64 ?M|65536|67108864"
# What is needed is said in a form that ulimit, systemd or limits.conf takes, and it is at least the guest's RAM.
grep -oE '[0-9]+ ?([KMG]i?B?)?' never.err | grep -qE '^(5[1-9][0-9] ?M|5[2-9][0-9]{4}|5[3-9][0-9]{7})' ||
    fail "the message does not say that 512 MiB or a little more is needed"

with_limit unlimited
expect "the status without a limit" $STATUS 0
