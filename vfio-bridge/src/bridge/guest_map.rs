//! The guest-physical map as the bridge needs it: where a guest-physical address is in this process.
//!
//! Only memory that is in this map can ever be handed to the host IOMMU. Building it from raw addresses is `unsafe`;
//! everything after that is safe, because a [`HostMem`] can only come out of a [`GuestMap`].

use std::any::Any;
use std::fs::File;
use std::sync::Arc;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vtd::{Gpa, Iova, Mapping, Perm, Requester};

/// Size of the smallest page that every part of the bridge works in.
pub const PAGE_SIZE: u64 = 4096;

/// What a piece of the guest-physical map is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MemKind {
    /// Guest RAM.
    Ram,
    /// Part of a BAR of an assigned function (B-10). It is handed to the host only: nobody in this process reads or
    /// writes it, since an access while the function's memory is disabled ends the process (F-2).
    Bar,
}

/// A file that backs host memory, for backends that map by file.
#[derive(Clone, Debug)]
pub struct Backing {
    /// The file.
    pub file: Arc<File>,
    /// Offset of the region's first byte in it.
    pub offset: u64,
}

/// A region of the guest-physical map: `len` bytes at `gpa`, which are at `hva` in this process.
#[derive(Clone)]
pub struct Region {
    gpa: u64,
    len: u64,
    hva: u64,
    backing: Option<Backing>,
    /// The whole region as a dma-buf.
    dma_buf: Option<Arc<File>>,
    /// The function whose BAR it is a part of; `None`: it is RAM.
    bar_of: Option<Requester>,
    /// Keeps what is at `hva`.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gpa, len, hva, bar_of, .. } = self;
        write!(f, "Region {{ gpa: {gpa:#x}, len: {len:#x}, hva: {hva:#x}, bar_of: {bar_of:?} }}")
    }
}

/// Why a guest-physical map cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GuestMapError {
    /// A region is empty or not made of whole pages.
    #[error("the memory region at {gpa:#x} with {len:#x} bytes is not made of whole 4 KiB pages")]
    Unaligned {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two regions share a guest-physical address.
    #[error("the memory regions at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// The memory has no address in this process.
    #[error("the memory region at {0:#x} is not mapped in this process")]
    NotMapped(u64),
}

impl Region {
    /// A region of RAM.
    ///
    /// # Safety
    /// Devices will read and write `hva..hva + len`. It must be a mapping that belongs to the guest alone and stays for
    /// as long as the region exists, and no Rust reference to it may exist in that time.
    pub unsafe fn ram(gpa: u64, len: u64, hva: u64, backing: Option<Backing>) -> Result<Self, GuestMapError> {
        let whole = |n: u64| n.is_multiple_of(PAGE_SIZE);
        let ends = |n: u64| n.checked_add(len).is_some();
        if len == 0 || !whole(gpa) || !whole(len) || !whole(hva) || !ends(gpa) || !ends(hva) {
            return Err(GuestMapError::Unaligned { gpa, len });
        }
        Ok(Self { gpa, len, hva, backing, dma_buf: None, bar_of: None, _owner: None })
    }

    /// A part of a BAR of the assigned function `of`, which `owner` keeps mapped at `hva` for as long as it exists
    /// (B-10). There is no file of it: the file of a function of the host is all of that function, and is never handed
    /// to another process.
    ///
    /// # Safety
    /// Devices will read and write `hva..hva + len`. It must be a shared mapping of that part of the BAR, which nothing
    /// in this process reads or writes, and which is there until `owner` is dropped.
    pub unsafe fn bar(
        gpa: u64,
        len: u64,
        hva: u64,
        of: Requester,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, GuestMapError> {
        // SAFETY: the same promise, but for what keeps it, which is in the region.
        let region = unsafe { Self::ram(gpa, len, hva, None) }?;
        Ok(Self { bar_of: Some(of), _owner: Some(owner), ..region })
    }

    /// The same, of which `dma_buf` is all (B-10). It is handed to the host's iommufd only: it gives nothing of the
    /// function but this part.
    #[must_use]
    pub fn with_dma_buf(self, dma_buf: Option<Arc<File>>) -> Self {
        Self { dma_buf, ..self }
    }

    /// What it is.
    pub fn kind(&self) -> MemKind {
        if self.bar_of.is_some() { MemKind::Bar } else { MemKind::Ram }
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    fn last(&self) -> u64 {
        self.gpa + (self.len - 1)
    }
}

/// Host memory behind a run of guest-physical addresses. It cannot outlive the map that it came from.
#[derive(Clone, Copy, Debug)]
pub struct HostMem<'a> {
    region: &'a Region,
    offset: u64,
    len: u64,
}

impl HostMem<'_> {
    /// Address in this process.
    pub fn hva(&self) -> u64 {
        self.region.hva + self.offset
    }
    /// Guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.region.gpa + self.offset
    }
    /// Length in bytes, not 0.
    pub fn size(&self) -> u64 {
        self.len
    }
    /// The file behind it and the offset there.
    pub fn backing(&self) -> Option<(&Arc<File>, u64)> {
        self.region.backing.as_ref().map(|b| (&b.file, b.offset + self.offset))
    }
    /// The dma-buf of which it is a part, and the offset there.
    pub fn dma_buf(&self) -> Option<(&Arc<File>, u64)> {
        self.region.dma_buf.as_ref().map(|file| (file, self.offset))
    }
    /// What it is.
    pub fn kind(&self) -> MemKind {
        self.region.kind()
    }
}

/// A piece of a run of guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// First guest-physical address of the piece.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether there is memory that can be mapped.
    pub present: bool,
}

/// Where guest-physical addresses are in this process.
#[derive(Clone)]
pub struct GuestMap {
    regions: Vec<Region>,
    /// Keeps what the regions point into.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl std::fmt::Debug for GuestMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMap").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl GuestMap {
    /// A map of `regions`, in any order.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, GuestMapError> {
        regions.sort_by_key(|r| r.gpa);
        if let Some(pair) = regions.windows(2).find(|pair| pair[0].last() >= pair[1].gpa) {
            return Err(GuestMapError::Overlap(pair[0].gpa, pair[1].gpa));
        }
        Ok(Self { regions, _owner: None })
    }

    /// The map of all of `memory`, which is kept for as long as the map is.
    pub fn of_memory<M>(memory: Arc<M>) -> Result<Self, GuestMapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let mut regions = Vec::new();
        for region in memory.iter() {
            let gpa = region.start_addr().raw_value();
            let hva = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| GuestMapError::NotMapped(gpa))?.addr()
                as u64;
            let backing = region.file_offset().map(|file| Backing { file: file.arc().clone(), offset: file.start() });
            // SAFETY: `memory` owns the mapping and is kept beside the regions; vm-memory gives out volatile
            // accesses to it only, no references.
            regions.push(unsafe { Region::ram(gpa, region.len(), hva, backing) }?);
        }
        let mut map = Self::new(regions)?;
        map._owner = Some(memory);
        Ok(map)
    }

    /// All regions, in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All of it at its guest-physical addresses, but for the BARs of `alone`: what the identity space has, where
    /// `alone` is the only function in it (B-12).
    pub(crate) fn identity(&self, alone: Option<Requester>) -> impl Iterator<Item = Mapping> {
        let reached = move |region: &&Region| region.bar_of.is_none() || region.bar_of != alone;
        self.regions.iter().filter(reached).map(|region| Mapping {
            iova: Iova(region.gpa),
            gpa: Gpa(region.gpa),
            len: region.len,
            perm: Perm::ReadWrite,
        })
    }

    /// The same map with `region` in it.
    ///
    /// # Errors
    /// Something has a part of its addresses already, and keeps it: RAM, or a BAR that came first.
    pub fn with(&self, region: Region) -> Result<Self, GuestMapError> {
        let at = self.regions.partition_point(|other| other.last() < region.gpa);
        if let Some(there) = self.regions.get(at).filter(|other| other.gpa <= region.last()) {
            return Err(GuestMapError::Overlap(there.gpa, region.gpa));
        }
        let mut map = self.clone();
        map.regions.insert(at, region);
        Ok(map)
    }

    /// The same map without the part of a BAR that begins at `gpa`, if one does. RAM never goes.
    pub fn without_bar(&self, gpa: u64) -> Self {
        let mut map = self.clone();
        map.regions.retain(|region| region.gpa != gpa || region.bar_of.is_none());
        map
    }

    /// Whether `gpa` is in a BAR.
    pub(crate) fn is_bar(&self, gpa: u64) -> bool {
        self.host_mem(gpa, 1).is_some_and(|mem| mem.kind() == MemKind::Bar)
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().filter(|region| region.kind() == MemKind::Ram).map(|region| region.len).sum()
    }

    /// Cuts `len` bytes at `gpa` into pieces that are either in one region or in none, in ascending order. Empty when
    /// the run is empty or wraps.
    pub fn pieces(&self, gpa: u64, len: u64) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(1);
        let Some(last) = len.checked_sub(1).and_then(|n| gpa.checked_add(n)) else {
            return pieces;
        };
        let mut push =
            |first: u64, last: u64, present| pieces.push(Piece { gpa: first, len: last - first + 1, present });
        let mut at = gpa;
        let start = self.regions.partition_point(|r| r.last() < gpa);
        for region in self.regions[start..].iter().take_while(|r| r.gpa <= last) {
            if region.gpa > at {
                push(at, region.gpa - 1, false);
                at = region.gpa;
            }
            let end = region.last().min(last);
            push(at, end, true);
            if end == last {
                return pieces;
            }
            at = end + 1;
        }
        push(at, last, false);
        pieces
    }

    /// The host memory behind `len` bytes at `gpa`, when one region holds all of it.
    pub fn host_mem(&self, gpa: u64, len: u64) -> Option<HostMem<'_>> {
        let last = gpa.checked_add(len.checked_sub(1)?)?;
        let region = &self.regions[self.regions.partition_point(|r| r.last() < gpa)..].first()?;
        (region.gpa <= gpa && last <= region.last()).then(|| HostMem { region, offset: gpa - region.gpa, len })
    }
}

#[cfg(test)]
#[path = "guest_map_test.rs"]
mod guest_map_test;
