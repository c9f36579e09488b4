# What devices of IOMMUFD_TEST write, by page tables of the kernel's iommufd, is what the bridge reports: each page and no other, while mappings
# come, go and are cut, in pages of any size, and with the bits that an unmap would lose. One without dirty bits has all dirty, and so has a
# function behind the bench's VT-d, whose ECAP.SSADS is 0.
# kernel: own
# needs: CONFIG_IOMMUFD_TEST
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

mock_ends_well
dirty_bits_are_those_of_the_unit
