# The two backends below the bridge, without a guest: a switch between two spaces of 4,000 mappings takes a millisecond at most on iommufd, at
# least 50 times less than on type1, and an edu that reads through 1,000 of them sees the old or the new and never a fault. 300,000 scattered
# mappings are held in one space, of which type1 refuses what is beyond its limit and keeps the rest. A page costs what the system calls do.
# What the edu writes is known page by page if the unit above it has dirty bits.
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

bind-vfio "$EDU" || fail "binding"
mark
host-spaces "$EDU" || fail "host-spaces"
! host_faults || fail "faults in the host's log"
dirty_bits_are_those_of_the_unit
