//! Dirty pages of a container (E-1, E-2).
//!
//! Type1 has no dirty bits: while a container has a group whose devices do DMA by themselves, which is every group of
//! ours, each bitmap has all that is mapped, whatever its permission, and again at the next read. It comes in pages of
//! the smallest size only, with a flag of an unmap that `VFIO_DMA_UNMAP_FLAG_ALL` does not go with.

use std::io;
use std::mem::size_of;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_TYPE, vfio_bitmap,
    vfio_iommu_type1_dirty_bitmap,
};
use vfio_ioctls::VfioContainer;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;
use vtd::IovaRange;

use super::{VFIO_IOMMU_UNMAP_DMA, check, u64_at};
use crate::host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};

ioctl_io_nr!(VFIO_IOMMU_DIRTY_PAGES, VFIO_TYPE.into(), VFIO_BASE + 17);

/// What `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION` says (5.8). Containers without it track nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Migration {
    /// Bytes of a page of its bitmaps.
    page_size: u64,
    /// The longest bitmap: bytes.
    most_bytes: u64,
}

impl Migration {
    /// From the capability at `at`: a header of 8 bytes, flags, and the two.
    pub fn parse(bytes: &[u8], at: usize) -> Option<Self> {
        let (page_sizes, most_bytes) = (u64_at(bytes, at + 16)?, u64_at(bytes, at + 24)?);
        let page_size = 1u64.checked_shl(page_sizes.trailing_zeros())?;
        Some(Self { page_size, most_bytes })
    }

    /// Room for the bitmap of `range`; `None` where the kernel takes none as long.
    fn words(self, range: IovaRange) -> Option<Vec<u64>> {
        let pages = range.last / self.page_size - range.first / self.page_size + 1;
        let words = pages.div_ceil(64);
        (words <= self.most_bytes / 8).then(|| vec![0; words as usize])
    }
}

/// The argument of an unmap with a bitmap (`vfio_iommu_type1_dma_unmap` and its `data`), and that of a read
/// (`vfio_iommu_type1_dirty_bitmap` with `vfio_iommu_type1_dirty_bitmap_get` as its `data`).
#[repr(C)]
struct WithBitmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    bitmap: vfio_bitmap,
}

impl WithBitmap {
    /// It points to `words` for as long as that is borrowed by whoever uses it.
    fn new(flags: u32, range: IovaRange, page_size: u64, words: &mut [u64]) -> io::Result<Self> {
        let size = (range.last - range.first).checked_add(1).filter(|size| range.first.checked_add(*size).is_some());
        let size = size.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let bitmap = vfio_bitmap { pgsize: page_size, size: size_of_val(words) as u64, data: words.as_mut_ptr() };
        Ok(Self { argsz: size_of::<Self>() as u32, flags, iova: range.first, size, bitmap })
    }
}

fn switch(container: &VfioContainer, flags: u32) -> io::Result<()> {
    let argsz = size_of::<vfio_iommu_type1_dirty_bitmap>() as u32;
    let argument = vfio_iommu_type1_dirty_bitmap { argsz, flags, ..Default::default() };
    // SAFETY: `argument` is what the call takes.
    check(unsafe { ioctl_with_ref(container, VFIO_IOMMU_DIRTY_PAGES(), &argument) })
}

/// Has the kernel keep bitmaps.
pub(super) fn start(container: &VfioContainer, migration: Option<Migration>) -> io::Result<DirtySupport> {
    migration.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
    switch(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_START)?;
    Ok(DirtySupport { knowledge: DirtyKnowledge::WholeMappings, window: UnmapWindow::Reported, holes: true })
}

/// Has it keep none.
pub(super) fn stop(container: &VfioContainer) -> io::Result<()> {
    switch(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
}

/// Reads and clears what is dirty in the range of `bitmap`, which cuts no mapping.
pub(super) fn read(container: &VfioContainer, migration: Migration, bitmap: &mut DirtyBitmap) -> io::Result<()> {
    let range = bitmap.range();
    let Some(mut words) = migration.words(range) else {
        // It would say nothing else.
        bitmap.mark(range);
        return Ok(());
    };
    let flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
    let argument = WithBitmap::new(flags, range, migration.page_size, &mut words)?;
    // SAFETY: `argument` is what the call takes, with as many bytes behind `bitmap.data` as it says; the kernel writes
    // there and nowhere else, and `words` lives on.
    check(unsafe { ioctl_with_ref(container, VFIO_IOMMU_DIRTY_PAGES(), &argument) })?;
    bitmap.mark_words(range.first, migration.page_size, &words);
    Ok(())
}

/// Unmaps the range of `bitmap`, and says what was dirty there. `None` where the kernel gives no bitmap as long:
/// nothing was done then.
pub(super) fn unmap(
    container: &VfioContainer,
    migration: Migration,
    bitmap: &mut DirtyBitmap,
) -> Option<io::Result<u64>> {
    let range = bitmap.range();
    let mut words = migration.words(range)?;
    let flags = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
    let unmapped = WithBitmap::new(flags, range, migration.page_size, &mut words).and_then(|mut argument| {
        // SAFETY: as for a read; the kernel writes the size that it unmapped to the argument, too.
        check(unsafe { ioctl_with_mut_ref(container, VFIO_IOMMU_UNMAP_DMA(), &mut argument) })?;
        Ok(argument.size)
    });
    bitmap.mark_words(range.first, migration.page_size, &words);
    Some(unmapped)
}

#[cfg(test)]
#[path = "dirty_test.rs"]
mod dirty_test;
