//! What one endpoint caches, for emulated DMA (rule 6), read without a lock; and the record of its sessions in flight.
//!
//! Three tables are cached: **pages** (an IOTLB), **directories**, which are what the entries above level 1 lead to for
//! 2 MiB (a paging-structure cache, section 6.2.5), and the **context** entry (section 6.2.3). A slot of them is a
//! sequence lock over three words, so a reader never waits. Pages and directories have sets of two.
//!
//! **A hit** loads the generation and a slot.
//!
//! **A miss** samples `epoch` and the generation before the first table read, walks the guest's tables with no lock,
//! from what is cached of the same generation, and stores what it found only if, with the slot held, `epoch` is still
//! the same. Before that it notes the domain, and whether the leaf is a large one.
//!
//! **An invalidation** first advances `epoch`: from then on no walk that began earlier is stored. Then it takes the
//! generation forward (everything is stale at once), or, for a few pages, empties just the slots of their directories
//! (more than an invalidation with IH set asks for), advances `epoch` again, since walks may have begun from these, and
//! empties the slots of the pages. A store that passed its check before `epoch` moved holds its slot until it is done,
//! so the emptying waits for it and finds it. Last, it waits for each session that is open: the access of a session may
//! still use what was just invalidated. Invalidations of one endpoint come one at a time.
//!
//! A session is a word of `sessions`: odd while it is open. The waiter notes the odd ones and waits until each of them
//! has changed, so sessions that begin later cannot hold it up.
//!
//! # Why the orderings are as they are
//!
//! Each is needed: with it weaker, the model on its right (`tests/models`, the code of this file under loom) fails.
//!
//! | ordering | what it is for | model |
//! |---|---|---|
//! | fence of `try_session`, of `wait_for_sessions` | the session sees the invalidation, or the invalidation the session | `an_access_..` |
//! | `close_session` release, `wait_for_sessions` acquire | the accesses of a session come before what its waiter does next | `an_access_..` |
//! | sequence acquire, fence acquire in `Slot::get`; release in `Slot::give_back`; fence of `Slot::take` | a hit is of one store | `a_hit_..` |
//! | fence of `Slot::take` against that of `advance_epoch` | a store sees the new epoch, or the emptying sees the store, the domain and the size | `a_walk_..` |
//! | sequence acquire in `Slot::empty` | it sees what was stored | `a_walk_..` |
//! | `epoch` release in `advance_epoch`, acquire in `sample` | a walk of the new epoch reads the tables of it | `a_walk_..` |
//! | generation release in `forget`, acquire in `sample` | what is noted for the new generation stays noted | `a_walk_of_a_large_leaf_..` |

use crate::ids::{DomainId, Gpa, Pasid};
use crate::range::IovaRange;
use crate::scope::Scope;
use crate::space::Perm;
use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, DIRECTORY_SETS, Ordering, PAGE_SETS, SESSIONS, fence, fence_after_update, relax,
    thread_number,
};

/// Up to this many pages an invalidation empties slots; beyond it takes the generation forward.
const MAX_PAGES_BY_SLOT: u64 = 64;
/// Pages of a directory.
const DIRECTORY_PAGES: u64 = 512;

// `owner` is a domain id and, from bit 32 on, a PASID and 1; or one of these.
const NO_OWNER: u64 = u64::MAX;
const MANY_OWNERS: u64 = u64::MAX - 1;
/// What is not translated is told from every domain id: an invalidation of a domain does not reach it.
const UNTRANSLATED: u64 = 1 << 16;
/// In the generation: requests are counted. No slot has it, so that no look-up of a hit finds anything. When a walk
/// began has it in the epoch.
const COUNTING: u64 = 1 << 63;

/// Of requests that are translated without a PASID, 0.
fn of_pasid(pasid: Option<Pasid>) -> u64 {
    pasid.map_or(0, |pasid| (u64::from(pasid.0) + 1) << 32)
}

/// What is cached of one key.
#[derive(Default)]
struct Slot {
    /// Odd while it is written.
    sequence: AtomicU32,
    key: AtomicU64,
    value: AtomicU64,
    /// The slot is empty unless this is the current generation.
    generation: AtomicU64,
}

impl Slot {
    #[inline(always)]
    fn get(&self, key: u64, generation: u64) -> Option<u64> {
        let before = self.sequence.load(Ordering::Acquire);
        // Whatever is stored meanwhile, not to have found it is right.
        if self.key.load(Ordering::Relaxed) != key {
            return None;
        }
        let value = self.value.load(Ordering::Relaxed);
        if self.generation.load(Ordering::Relaxed) != generation {
            return None;
        }
        fence(Ordering::Acquire);
        let of_one_store = before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before;
        of_one_store.then_some(value)
    }

    /// Both words of a store, which has no key.
    fn get_both(&self, generation: u64) -> Option<[u64; 2]> {
        let key = self.key.load(Ordering::Relaxed);
        // Whether they are of one store is seen to there.
        self.get(key, generation).map(|value| [value, key])
    }

    /// Holds the slot for a store, unless somebody does; the sequence that it had. What comes before is seen by whoever
    /// does not see it held, and no store that comes after is seen by whoever does not.
    #[inline(always)]
    fn take(&self) -> Option<u32> {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let next = sequence.wrapping_add(1);
        let free = sequence & 1 == 0;
        let taken =
            free && self.sequence.compare_exchange(sequence, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        fence_after_update();
        taken.then_some(sequence)
    }

    fn give_back(&self, sequence: u32) {
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Empties the slot if it has `key`, when no store is under way. After the epoch was advanced: a store that begins
    /// now is of a walk that began after it.
    fn empty(&self, key: u64) {
        let mut attempt = 0;
        while self.sequence.load(Ordering::Acquire) & 1 != 0 {
            relax(attempt);
            attempt += 1;
        }
        if self.key.load(Ordering::Relaxed) == key {
            self.generation.store(0, Ordering::Relaxed);
        }
    }
}

/// Two keys that do not push each other out. A cache line.
#[derive(Default)]
#[repr(align(64))]
struct Set([Slot; 2]);

impl Set {
    #[inline(always)]
    fn get(&self, key: u64, generation: u64) -> Option<u64> {
        self.0[0].get(key, generation).or_else(|| self.0[1].get(key, generation))
    }

    /// Where `key` is to be stored: where it is, else where nothing is, else where less was stored.
    #[inline(always)]
    fn slot_for(&self, key: u64, generation: u64) -> &Slot {
        let [first, second] = &self.0;
        let has = |slot: &Slot| slot.key.load(Ordering::Relaxed) == key;
        let is_free = |slot: &Slot| slot.generation.load(Ordering::Relaxed) != generation;
        let stores = |slot: &Slot| slot.sequence.load(Ordering::Relaxed);
        if has(first) {
            first
        } else if has(second) {
            second
        } else if is_free(first) {
            first
        } else if is_free(second) || stores(first) > stores(second) {
            second
        } else {
            first
        }
    }
}

/// A table of sets; a key's set is named by its lowest bits.
struct Table<const SETS: usize>(Box<[Set; SETS]>);

impl<const SETS: usize> Default for Table<SETS> {
    fn default() -> Self {
        let sets: Box<[Set]> = (0..SETS).map(|_| Set::default()).collect();
        Self(sets.try_into().ok().expect("there are as many as asked for"))
    }
}

impl<const SETS: usize> Table<SETS> {
    #[inline]
    fn set(&self, key: u64) -> &Set {
        &self.0[key as usize % SETS]
    }

    fn empty(&self, key: u64) {
        self.set(key).0.iter().for_each(|slot| slot.empty(key));
    }
}

/// Keeps what different threads write on different cache lines; some processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Session(AtomicU64);

/// When a walk began; what it finds may be stored only if no invalidation came since. The order of the two does not
/// matter: what is of the old epoch is not stored, and of the old generation nothing is found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampled {
    epoch: u64,
    generation: u64,
}

impl Sampled {
    /// Whether requests are counted.
    #[inline]
    pub(crate) fn counting(self) -> bool {
        self.epoch & COUNTING != 0
    }

    /// The same, and nothing is counted.
    pub(crate) fn not_counting(self) -> Self {
        Self { epoch: self.epoch & !COUNTING, ..self }
    }
}

/// A translation of a page as it is cached: where it leads, and below that the bits of [`Perm`], of which there is one
/// at least.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CachedPage(u64);

impl CachedPage {
    /// A page that leads to that of `target`.
    pub(crate) const fn new(target: Gpa, perm: Perm) -> Self {
        Self(target.0 & !0xfff | perm as u64)
    }

    /// The same of these bits of [`Perm`], if there is one.
    #[inline(always)]
    pub(crate) fn from_bits(target: Gpa, bits: u64) -> Option<Self> {
        (bits & 3 != 0).then_some(Self(target.0 & !0xfff | bits & 3))
    }

    /// Where it leads.
    #[inline(always)]
    pub(crate) fn target(self) -> Gpa {
        Gpa(self.0 & !0xfff)
    }

    /// Whether all of these bits of [`Perm`] are permitted.
    #[inline(always)]
    pub(crate) fn permits(self, bits: u8) -> bool {
        self.0 & u64::from(bits) == u64::from(bits)
    }
}

/// What is cached of one endpoint, and its sessions.
pub(crate) struct Iotlb {
    pages: Table<PAGE_SETS>,
    directories: Table<DIRECTORY_SETS>,
    context: Slot,
    /// From 1: a slot that was never written is of no generation.
    generation: AtomicU64,
    epoch: AtomicU64,
    /// The domain that everything cached belongs to, and the PASID.
    owner: AtomicU64,
    /// Something of a large leaf is cached: an invalidation of any part of the leaf must find it.
    large: AtomicBool,
    /// Something of a first stage is cached: an invalidation of addresses of the second stage must find it.
    first: AtomicBool,
    sessions: [Session; SESSIONS],
}

impl Default for Iotlb {
    fn default() -> Self {
        Self {
            pages: Table::default(),
            directories: Table::default(),
            context: Slot::default(),
            generation: AtomicU64::new(1),
            epoch: AtomicU64::new(0),
            owner: AtomicU64::new(NO_OWNER),
            large: AtomicBool::new(false),
            first: AtomicBool::new(false),
            sessions: Default::default(),
        }
    }
}

/// An open session: which of the sessions, and its number.
#[derive(Debug)]
pub(crate) struct SessionToken {
    index: usize,
    number: u64,
}

impl Iotlb {
    /// The cached translation of a page.
    #[inline(always)]
    pub(crate) fn page(&self, page: u64) -> Option<CachedPage> {
        self.page_of(page, self.generation.load(Ordering::Relaxed))
    }

    /// The same for a request that is counted.
    pub(crate) fn page_counting(&self, sampled: Sampled, page: u64) -> Option<CachedPage> {
        self.page_of(page, sampled.generation)
    }

    /// From now on requests are counted, or they are not. To be called where invalidations are.
    pub(crate) fn set_counting(&self, counting: bool) {
        if counting {
            self.generation.fetch_or(COUNTING, Ordering::Relaxed);
        } else {
            self.generation.fetch_and(!COUNTING, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn page_of(&self, page: u64, generation: u64) -> Option<CachedPage> {
        self.pages.set(page).get(page, generation).map(CachedPage)
    }

    /// To be called before the first table read of a walk.
    #[inline(always)]
    pub(crate) fn sample(&self) -> Sampled {
        let Sampled { epoch, generation } = self.sample_as_it_is();
        Sampled { epoch: epoch | generation & COUNTING, generation: generation & !COUNTING }
    }

    /// The same, unless requests are counted.
    #[inline(always)]
    pub(crate) fn sample_not_counting(&self) -> Option<Sampled> {
        let sampled = self.sample_as_it_is();
        (sampled.generation & COUNTING == 0).then_some(sampled)
    }

    #[inline(always)]
    fn sample_as_it_is(&self) -> Sampled {
        let epoch = self.epoch.load(Ordering::Acquire);
        let generation = self.generation.load(Ordering::Acquire);
        Sampled { epoch, generation }
    }

    /// What is cached for the 2 MiB with this number. Its domain has been noted, and its size.
    #[inline(always)]
    pub(crate) fn directory(&self, sampled: Sampled, number: u64) -> Option<u64> {
        self.directories.set(number).get(number, sampled.generation)
    }

    /// What is cached of the context entry. Its domain has been noted.
    pub(crate) fn context(&self, sampled: Sampled) -> Option<[u64; 2]> {
        self.context.get_both(sampled.generation)
    }

    /// Notes the domain and the PASID that something belongs to, before it is stored; no domain for what is not
    /// translated.
    pub(crate) fn note_owner(&self, domain: Option<DomainId>, pasid: Option<Pasid>) {
        let owner = domain.map_or(UNTRANSLATED, |domain| u64::from(domain.0)) | of_pasid(pasid);
        if self.owner.load(Ordering::Relaxed) == owner {
            return;
        }
        let noted = self.owner.compare_exchange(NO_OWNER, owner, Ordering::Relaxed, Ordering::Relaxed);
        if noted.is_err_and(|other| other != owner) {
            self.owner.store(MANY_OWNERS, Ordering::Relaxed);
        }
    }

    /// Notes that something is of a first stage, before it is stored.
    pub(crate) fn note_first(&self) {
        self.first.store(true, Ordering::Relaxed);
    }

    /// Notes that something is of a large leaf, before it is stored.
    pub(crate) fn note_large(&self) {
        self.large.store(true, Ordering::Relaxed);
    }

    /// Stores the translation of a page, unless an invalidation came since `sampled`, or the slot is busy.
    #[inline(always)]
    pub(crate) fn insert_page(&self, sampled: Sampled, page: u64, CachedPage(value): CachedPage) {
        self.insert(self.pages.set(page).slot_for(page, sampled.generation), sampled, page, value);
    }

    /// The same for the directory of the 2 MiB with this number.
    pub(crate) fn insert_directory(&self, sampled: Sampled, number: u64, value: u64) {
        let slot = self.directories.set(number).slot_for(number, sampled.generation);
        self.insert(slot, sampled, number, value);
    }

    /// The same for the context entry.
    pub(crate) fn insert_context(&self, sampled: Sampled, [first, second]: [u64; 2]) {
        self.insert(&self.context, sampled, second, first);
    }

    #[inline(always)]
    fn insert(&self, slot: &Slot, sampled: Sampled, key: u64, value: u64) {
        let Some(sequence) = slot.take() else { return };
        if self.epoch.load(Ordering::Relaxed) == sampled.epoch & !COUNTING {
            slot.key.store(key, Ordering::Relaxed);
            slot.value.store(value, Ordering::Relaxed);
            slot.generation.store(sampled.generation, Ordering::Relaxed);
        }
        slot.give_back(sequence);
    }

    /// Makes stale what `scope` reaches, of walks that end later, too. Does not wait for sessions.
    pub(crate) fn invalidate(&self, scope: Scope) {
        self.invalidate_of(scope, None);
    }

    /// The same, of one PASID. Addresses are then those of the requests; else they are those of the second stage, where
    /// there are two (section 6.5.2.3).
    pub(crate) fn invalidate_of(&self, scope: Scope, pasid: Option<Pasid>) {
        self.advance_epoch();
        let cached = self.owner.load(Ordering::Relaxed);
        let of_pasid = pasid.is_none() || cached & !0xffff_ffff == of_pasid(pasid);
        let reaches =
            |domain: DomainId| cached == MANY_OWNERS || of_pasid && cached & 0xffff_ffff == u64::from(domain.0);
        let other_addresses = || pasid.is_none() && self.first.load(Ordering::Relaxed);
        match scope {
            Scope::Everything => self.forget(),
            Scope::Domain(domain) if reaches(domain) => self.forget(),
            Scope::Pages(domain, IovaRange { first, last }) if reaches(domain) => {
                let (first, last) = (first >> 12, last >> 12);
                if last - first >= MAX_PAGES_BY_SLOT || self.large.load(Ordering::Relaxed) || other_addresses() {
                    self.forget();
                } else {
                    let directories = first / DIRECTORY_PAGES..=last / DIRECTORY_PAGES;
                    directories.for_each(|number| self.directories.empty(number));
                    // A walk of the new epoch may have found a directory before it went.
                    self.advance_epoch();
                    (first..=last).for_each(|page| self.pages.empty(page));
                }
            }
            Scope::Domain(_) | Scope::Pages(..) => {}
        }
    }

    /// No walk that began before is stored from now on.
    fn advance_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
        fence_after_update();
    }

    fn forget(&self) {
        // In this order: what is noted after the generation moved belongs to the new one.
        self.owner.store(NO_OWNER, Ordering::Relaxed);
        self.large.store(false, Ordering::Relaxed);
        self.first.store(false, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Opens a session. Takes no lock; waits only while all sessions of this endpoint are open.
    #[inline]
    pub(crate) fn open_session(&self) -> SessionToken {
        // Each thread begins at a word of its own, so that threads do not take a cache line from each other.
        let own = thread_number() % SESSIONS;
        self.try_session(own).unwrap_or_else(|| self.another_session(own))
    }

    #[inline]
    fn try_session(&self, index: usize) -> Option<SessionToken> {
        let session = &self.sessions[index].0;
        let number = session.load(Ordering::Relaxed);
        let free = number & 1 == 0;
        let opened = free && session.compare_exchange(number, number + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        fence_after_update();
        opened.then_some(SessionToken { index, number: number + 1 })
    }

    #[cold]
    fn another_session(&self, own: usize) -> SessionToken {
        let mut attempt = 0;
        loop {
            let found = (0..SESSIONS).find_map(|offset| self.try_session((own + offset) % SESSIONS));
            if let Some(token) = found {
                return token;
            }
            relax(attempt);
            attempt += 1;
        }
    }

    /// Closes a session.
    #[inline]
    pub(crate) fn close_session(&self, token: &SessionToken) {
        self.sessions[token.index].0.store(token.number + 1, Ordering::Release);
    }

    /// Waits for every session that is open now.
    pub(crate) fn wait_for_sessions(&self) {
        fence(Ordering::SeqCst);
        for Session(session) in &self.sessions {
            let number = session.load(Ordering::Acquire);
            let mut attempt = 0;
            while number & 1 != 0 && session.load(Ordering::Acquire) == number {
                relax(attempt);
                attempt += 1;
            }
        }
    }
}
