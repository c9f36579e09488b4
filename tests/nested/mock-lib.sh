# What the cases of IOMMUFD_TEST's devices share. Sourced behind lib.sh.

modprobe iommufd || fail "no iommufd"

# mock_ends_well [OPTION...]: iommufd-mock does, and nothing in the kernel complains meanwhile.
mock_ends_well() {
    mark
    iommufd-mock "$@" || fail "iommufd-mock $*"
    complaints=$(dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'WARNING|BUG|Oops')
    [ -z "$complaints" ] || fail "the kernel's log has '$complaints'"
}

# dirty_bits_are_those_of_the_unit: it is known page by page what an edu writes if the unit above it has dirty bits, and only then.
dirty_bits_are_those_of_the_unit() {
    bind-vfio "$EDU" || fail "binding"
    ecap=$(cat "/sys/bus/pci/devices/$EDU/iommu/intel-iommu/ecap")
    ssads=$((0x$ecap >> 45 & 1))
    known=$(iommufd-mock --function "$EDU" | sed -n 's/^function: //p')
    echo "ECAP is $ecap, SSADS $ssads; what an edu writes is known as '$known'"
    expect "how it is known" "$known" "$([ $ssads = 1 ] && echo exact || echo cannot-tell)"
}
