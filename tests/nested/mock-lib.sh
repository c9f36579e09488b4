# What the cases of IOMMUFD_TEST's devices share. Sourced behind lib.sh.

modprobe iommufd || fail "no iommufd"

# Of all processors, up to now.
pinned() { cat /proc/sys/vm/stat_refresh; awk '/^nr_foll_pin_acquired/ { n += $2 } /^nr_foll_pin_released/ { n -= $2 } END { print n }' /proc/vmstat; }

# mock_ends_well [OPTION...]: iommufd-mock does, nothing stays pinned, and nothing in the kernel complains meanwhile. But for one thing: where several
# mappings have the same page, Linux 6.12 looks it up in a page table that has it no more, of which its mock warns.
mock_ends_well() {
    mark
    before=$(pinned)
    iommufd-mock "$@" || fail "iommufd-mock $*"
    expect "the number of pages that stay pinned" $(($(pinned) - before)) 0
    complaints=$(dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'WARNING|BUG|Oops' | grep -v mock_domain_iova_to_phys)
    [ -z "$complaints" ] || fail "the kernel's log has '$complaints'"
}

# dirty_bits_are_those_of_the_unit: it is known page by page what the edu, which is bound, writes if the unit above it has dirty bits, and only then.
dirty_bits_are_those_of_the_unit() {
    ecap=$(cat "/sys/bus/pci/devices/$EDU/iommu/intel-iommu/ecap")
    ssads=$((0x$ecap >> 45 & 1))
    known=$(iommufd-mock --function "$EDU" | sed -n 's/^function: //p')
    echo "ECAP is $ecap, SSADS $ssads; what an edu writes is known as '$known'"
    expect "how it is known" "$known" "$([ $ssads = 1 ] && echo exact || echo cannot-tell)"
}

# backends_compared [OPTION...]: host-spaces with the edu. Its own blocked reads, of which the context entry is not there, are no failure.
backends_compared() {
    bind-vfio "$EDU" || fail "binding"
    mark
    host-spaces "$EDU" "$@" || fail "host-spaces"
    ! host_faults | grep -v 'DMAR: DRHD: handling fault status' | grep -v 'fault reason 0x0*2\]' || fail "faults in the host's log"
}
