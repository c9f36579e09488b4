# The two backends below the bridge, without a guest: an edu that reads through 1,000 switches between two spaces of 4,000 mappings sees the old or
# the new, or is blocked in the moment of an attach, for which Linux's driver of VT-d takes its entry away, and never sees anything else. 300,000
# scattered mappings are held in one space, of which type1 refuses what is beyond its limit and keeps the rest. What the edu writes is known page
# by page if the unit above it has dirty bits. How long it all takes is printed; iommufd_beside_type1_in_time has bounds.
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

backends_compared
dirty_bits_are_those_of_the_unit
