# limit: 240
# The test images that need no fault record and no second device, with an assigned edu: guest tables, notifications, the bridge and the real
# IOMMU. The same images pass with the emulated edu (`images::`).
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
causeway test --device vfio,host="$EDU" --timeout 120 --filter "^(\
a1_(page_is|2m_leaf|read_only|pass_through|device_moves|transfer_across)|\
a9_(entry_delivers$|entry_invalidation|entry_that_is)|a10_|a11_translation|\
b1_|b2_|b3_whole_space_unmap_39|b6_|b8_|b9_|b14_|\
f1_|f2_|f5_message|f6_bus_master)" >images.log 2>&1
status=$?
cat images.log
expect "status of the images" "$status" 0
