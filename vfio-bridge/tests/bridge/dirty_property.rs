//! Random sequences of what a unit may say, with devices that write between them: what a read gives back is exactly
//! what was written since the one before, however the mappings came and went (E-2, E-4).

use std::collections::BTreeSet;

use proptest::prelude::*;
use vfio_bridge::{DirtyKnowledge, DirtyRace};

use crate::dirty::{GROUPS, gpa, pages};
use crate::property::Run;
use crate::scenario::{Host, Step, scenario};
use crate::world::*;

#[derive(Clone, Debug)]
enum Act {
    Step(Step),
    /// The device of a group writes to the nth page that it reaches.
    Write(usize, usize),
    Read,
    /// Of the device of a group.
    ReadOf(usize),
}

fn acts() -> impl Strategy<Value = (Host, Vec<Act>)> {
    scenario().prop_flat_map(|(host, steps)| {
        let len = steps.len();
        let between = prop_oneof![
            6 => (0usize..2, any::<usize>()).prop_map(|(group, nth)| Act::Write(group, nth)),
            1 => Just(Act::Read),
            1 => (0usize..2).prop_map(Act::ReadOf),
        ];
        let between = prop::collection::vec(prop::collection::vec(between, 0..6), len);
        (Just(host), Just(steps), between).prop_map(|(host, steps, between)| {
            let acts = steps.into_iter().zip(between);
            (host, acts.flat_map(|(step, between)| std::iter::once(Act::Step(step)).chain(between)).collect())
        })
    })
}

const DEVICES: [u8; 2] = [1, 3];

struct Writes {
    run: Run,
    per_space: bool,
    /// By group: what was written since its last read.
    written: [BTreeSet<u64>; 2],
    /// What both wrote since all was read: who is in one space cannot be told apart, so what one wrote and was read of
    /// it is read of the other, too.
    shared: BTreeSet<u64>,
    /// Of hosts that do not know better: what could be written since.
    writable: [BTreeSet<u64>; 2],
}

impl Writes {
    fn new(host: &Host, knowledge: DirtyKnowledge, race: DirtyRace) -> Self {
        let run = Run::new(host);
        run.world.model.set_dirty_knowledge(knowledge);
        run.world.bridge.dirty_start(None, race).expect("all");
        Self {
            run,
            per_space: host.per_space,
            written: Default::default(),
            shared: BTreeSet::new(),
            writable: Default::default(),
        }
    }

    fn reach(&self, group: usize) -> BTreeSet<u64> {
        let pages = pages_of(&self.run.world.model.contents(GROUPS[group]));
        pages.into_values().filter(|(_, perm)| perm.writable()).map(|(hva, _)| gpa(hva)).collect()
    }

    fn note_reach(&mut self) {
        for group in [0, 1] {
            let reach = self.reach(group);
            self.writable[group].extend(reach);
        }
    }

    fn act(&mut self, act: &Act, knowledge: DirtyKnowledge) -> Result<(), TestCaseError> {
        match act {
            Act::Step(step) => self.run.step(step)?,
            Act::Write(group, nth) => {
                let reach = pages_of(&self.run.world.model.contents(GROUPS[*group]));
                let writable: Vec<u64> =
                    reach.iter().filter(|(_, (_, perm))| perm.writable()).map(|(iova, _)| *iova).collect();
                if let Some(iova) = writable.get(nth % writable.len().max(1)) {
                    let hva = self.run.world.model.write(GROUPS[*group], *iova).expect("writable");
                    self.written[*group].insert(gpa(hva));
                    self.shared.insert(gpa(hva));
                }
            }
            Act::Read => {
                let read = self.run.world.bridge.dirty_read(None).expect("tracked");
                let found: BTreeSet<u64> = pages(&read.pages).into_iter().collect();
                let [one, two] = std::mem::take(&mut self.written);
                let written: BTreeSet<u64> = one.union(&two).copied().collect();
                let [one, two] = std::mem::take(&mut self.writable);
                let writable: BTreeSet<u64> = one.union(&two).copied().collect();
                let mut most = std::mem::take(&mut self.shared);
                if !self.per_space {
                    most.clone_from(&written);
                }
                check(&found, &written, &most, &writable, knowledge)?;
            }
            Act::ReadOf(group) => {
                let device = requester(DEVICES[*group]);
                let read = self.run.world.bridge.dirty_read(Some(device)).expect("tracked");
                let found: BTreeSet<u64> = pages(&read.pages).into_iter().collect();
                let written = std::mem::take(&mut self.written[*group]);
                let writable = std::mem::take(&mut self.writable[*group]);
                let most = if self.per_space { self.shared.clone() } else { written.clone() };
                check(&found, &written, &most, &writable, knowledge)?;
            }
        }
        self.note_reach();
        Ok(())
    }
}

/// `found` has all that was `written`, and nothing that was not: no more than `most`, of a host that knows that.
fn check(
    found: &BTreeSet<u64>,
    written: &BTreeSet<u64>,
    most: &BTreeSet<u64>,
    writable: &BTreeSet<u64>,
    knowledge: DirtyKnowledge,
) -> Result<(), TestCaseError> {
    prop_assert!(found.is_superset(written), "{found:x?} without some of {written:x?}");
    if knowledge == DirtyKnowledge::Exact {
        prop_assert!(found.is_subset(most), "{found:x?} with more than {most:x?}");
    } else {
        // What was mapped for a moment in the middle of a step is not seen here, so no more can be said than that all
        // is there that was writable before or after one.
        prop_assert!(found.is_superset(writable), "{found:x?} without some of {writable:x?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn e4_a_read_gives_back_exactly_what_was_written_since_the_one_before(
        (host, acts) in acts(), per_space: bool, closed: bool, holes: bool,
    ) {
        let race = if closed { DirtyRace::Closed } else { DirtyRace::Open };
        let mut writes = Writes::new(&Host { per_space, ..host }, DirtyKnowledge::Exact, race);
        if !holes {
            writes.run.world.model.stop_at_holes();
            // It is told when it starts.
            writes.run.world.bridge.dirty_stop(None).expect("all");
            writes.run.world.bridge.dirty_start(None, race).expect("all");
        }
        for act in acts.iter().chain([&Act::Read]) {
            writes.act(act, DirtyKnowledge::Exact)?;
        }
    }

    #[test]
    fn e1_a_host_that_knows_less_says_more_and_never_less(
        (host, acts) in acts(), per_space: bool, whole: bool,
    ) {
        let knowledge = if whole { DirtyKnowledge::WholeMappings } else { DirtyKnowledge::CannotTell };
        let mut writes = Writes::new(&Host { per_space, ..host }, knowledge, DirtyRace::Open);
        for act in acts.iter().chain([&Act::Read]) {
            writes.act(act, knowledge)?;
        }
    }
}
