# kernel: own
# needs: CONFIG_IOMMUFD
# long
# As iommufd_beside_type1, on a machine that does nothing else: half of the switches on iommufd take a millisecond at most, at least 50 times less
# than one on type1, and a page mapped and unmapped costs at most a tenth more than the system calls, on both.
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

backends_compared --in-time
