# The devices of IOMMUFD_TEST on the newer host's kernel: what they write (iommufd_mock_dirty), and the requests of one of them with two PASIDs
# in two spaces beside its own, each moved by itself, each undone after a failure.
# host: new
# kernel: own
# needs: CONFIG_IOMMUFD_TEST
. /causeway/files/lib.sh
. /causeway/files/mock-lib.sh

mock_ends_well --pasids
dirty_bits_are_those_of_the_unit
