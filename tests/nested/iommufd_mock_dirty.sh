# What devices of IOMMUFD_TEST write, by page tables of the kernel's iommufd, is what the bridge reports: each page and no other, while mappings
# come, go and are cut, in pages of any size, with the bits that an unmap would lose, and, if that is asked for, with what is written in the last
# moment. One without dirty bits has all dirty. (Beside a real IOMMU Linux 6.12 takes the mock devices for that one's.)
# kernel: own
# append: intel_iommu=off
# needs: CONFIG_IOMMUFD_TEST
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

mock_ends_well
