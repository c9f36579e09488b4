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
owner_of "$EDU" crowded.cpio

mark
as_owner $((320 << 10)) crowded intel_iommu=on --memory 256M --device vfio,host="$EDU"
[ $STATUS = 0 ] && grep -q 'guest: exit 0' crowded.log || { tail -n 40 crowded.log crowded.err; fail "the guest: status $STATUS"; }
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
