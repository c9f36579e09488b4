# An edu assigned by iommufd, driven by the guest's own vfio, reaches exactly what the guest's tables grant; what it aims elsewhere is
# stopped by the real IOMMU.
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh

modprobe iommufd || fail "no iommufd"
bind-vfio "$EDU" || fail "binding"

# in_guest COMMAND: guest-lib's `edu SCENARIO...` inside a guest.
in_guest() {
    printf '%s\nshow_faults\n' "$1" | guest edu
    mark
    run edu intel_iommu=on --device vfio,host="$EDU",backend=iommufd
    grep -E '^(roundtrip|msi|outside|armed|readonly|big|loop|fault):' edu.log
}

in_guest "edu roundtrip msi"
no_faults edu

in_guest "edu readonly 'loop 20'"

in_guest "edu outside"
host_faults >faults || fail "DMA outside the mappings, and no fault in the log of L1's kernel"
expect_line faults "DMA Write.*\[${EDU#*:}\]" "DMA Read.*\[${EDU#*:}\]"
expect "fault lines in the guest's log" "$(lines edu 'guest-fault: ')" ""

in_guest "edu armed"
expect_line edu.log "armed: programmed while mapped, fired after UNMAP" "still pending when UNMAP returned"
wait_until 10 host_faults >faults || fail "DMA after UNMAP, and no fault in the log of L1's kernel"
expect_line faults "DMA Write.*\[${EDU#*:}\]"
