//! The listener of the harness: what it was told, and that it was told in order.

use std::collections::BTreeMap;
use std::sync::Mutex;

use vtd::{Applied, AttachRefused, Gpa, Iova, MapOp, Mapping, Requester, SpaceKey, SpaceListener, Stream};

/// What was told.
#[derive(Default)]
pub struct Told {
    pub attached: BTreeMap<Requester, SpaceKey>,
    pub spaces: BTreeMap<SpaceKey, BTreeMap<u64, Mapping>>,
}

#[derive(Default)]
pub struct Listener(pub Mutex<Told>);

impl Told {
    fn forget_unused(&mut self) {
        let Self { attached, spaces } = self;
        spaces.retain(|key, _| attached.values().any(|of| of == key));
    }
}

impl SpaceListener for Listener {
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        let mut told = self.0.lock().unwrap();
        let live: BTreeMap<u64, Mapping> = live.map(|mapping| (mapping.iova.0, mapping)).collect();
        told.attached.insert(stream.requester, *space);
        let before = told.spaces.insert(*space, live.clone());
        assert!(before.is_none_or(|before| before == live), "one that joins is told what the others have");
        told.forget_unused();
        Ok(())
    }

    fn detach(&self, stream: Stream) {
        let mut told = self.0.lock().unwrap();
        assert!(told.attached.remove(&stream.requester).is_some());
        told.forget_unused();
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        let mut told = self.0.lock().unwrap();
        let mapped = told.spaces.get_mut(space).expect("a space with members");
        let mut maps = false;
        for op in ops {
            match *op {
                MapOp::Unmap(range) => {
                    assert!(!maps, "an unmap behind a map");
                    let hit = mapped.range(..=range.last).map(|(_, m)| *m);
                    let hit: Vec<Mapping> = hit.filter(|m| m.last().0 >= range.first).collect();
                    for old in hit {
                        mapped.remove(&old.iova.0);
                        for rest in old.range().without([range]) {
                            let (iova, len) = (Iova(rest.first), rest.last - rest.first + 1);
                            let gpa = Gpa(old.gpa.0 + (rest.first - old.iova.0));
                            mapped.insert(rest.first, Mapping { iova, gpa, len, ..old });
                        }
                    }
                }
                MapOp::Map(new) => {
                    maps = true;
                    let below = mapped.range(..=new.last().0).next_back();
                    assert!(below.is_none_or(|(_, below)| below.last() < new.iova), "something is mapped there");
                    mapped.insert(new.iova.0, new);
                }
            }
        }
        Applied::default()
    }
}
