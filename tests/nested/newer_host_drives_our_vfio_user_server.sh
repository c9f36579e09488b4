# `causeway device edu` serves the vfio-user client of another VMM: QEMU's, behind QEMU's own VT-d. A Linux guest drives it by its vfio, and
# DMA reaches what that guest's tables grant and nothing else.
# host: new
. /causeway/files/lib.sh
VMM=qemu

causeway device edu --socket "$PWD/edu.sock" >server.log 2>&1 &
server=$!
wait_until 10 test -S edu.sock || fail "no socket: $(cat server.log)"
guest edu <<'GUEST'
edu roundtrip msi readonly outside armed "loop 10" big
GUEST
run edu intel_iommu=on --device "vfio-user,socket=$PWD/edu.sock"
grep -E '^(roundtrip|msi|outside|armed|readonly|big|loop):' edu.log
for scenario in roundtrip msi readonly outside armed loop big; do
    expect_line edu.log "^$scenario:"
done
kill -0 $server || fail "the server ended with its client: $(cat server.log)"
kill $server
