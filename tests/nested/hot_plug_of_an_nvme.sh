#!/bin/sh
# An assigned NVMe comes while the guest runs, reads right behind the IOMMU, goes when the guest is asked for it, and comes again, while an edu
# behind another root port does I/O all the time. When it is gone, nobody has its VFIO group open.
# limit: 600
# long
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

nvme_comes_and_goes type1
