# A guest that goes down in order turns translation off, three times. Its edu is under DMA in a page that is at the same place before and after, and has
# another page mapped that is not. The trace shows how the edu's container came from its domain to identity: all RAM around the two was there
# before anything went, the first page never went, and the other was away for an unmap and a map of its own size.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$EDU" || fail "binding"
{ guest_functions && cat <<'GUEST'; } | guest gap
work_begins edu
edu_at_home
echo "ready"
read -r answer </dev/ttyS0
[ "$answer" = off ] || { reboot -f; sleep 100; }
work_ends edu
show_faults
GUEST
came_up() { [ "$(grep -c '^ready' gap.log)" -ge "$1" ]; }
mkfifo answers
{
    for number in 1 2 3 4; do
        wait_until 60 came_up $number || exit 1
        case $number in 4) echo off ;; *) echo reboot ;; esac
    done
} >answers &
mark
count_host_operations
INPUT=answers run gap "intel_iommu=on" --device vfio,host="$EDU" --trace gap.trace
expect "guest_resets" "$(field gap.json guest_resets)" 3
sound gap 4

# The switches to identity with an unmap in RAM: what was mapped before and how long that took, the page, the time from before its unmap to
# after its map, and how many maps that were.
awk '
    function at(key) { match($0, " " key "=[^ ]*"); return substr($0, RSTART + length(key) + 2, RLENGTH - length(key) - 2) }
    / notify attach / { inside = at("space") == "identity"; before = ""; maps = 0; taken = ""; pinning = 0 }
    / notify attached / {
        if (inside && replaced != "") print "gap: " before " in " int(pinning / 1e6) " ms, " replaced ", " maps " maps"
        inside = 0; replaced = ""
    }
    inside && / host map / {
        maps++
        if (taken == at("iova")) { replaced = taken " away for " int(($1 - since) * 1e6 + ns / 1000) " us"; taken = "" }
        else if (replaced == "" && taken == "") { before = before " " at("iova"); pinning += at("ns") }
        else print "gap: a late map " at("iova")
    }
    inside && / host unmap / {
        if (taken != "") print "gap: " taken " and " at("iova") " are away at once"
        if (at("iova") ~ /^0x10/ && length(at("iova")) == 19) { taken = at("iova"); since = $1; ns = at("ns") }
    }
' gap.trace >gaps
cat gaps
expect "pages that were replaced" "$(grep -c ', 0x1000000-0x1000fff away for .*, 4 maps' gaps)" 3
expect "other lines" "$(grep -vc ', 0x1000000-0x1000fff away for .*, 4 maps' gaps)" 0
