//! What the nested cases need: the static programs, the images of each host, and in CI the own kernel. A thread of the
//! lowest priority makes it all from the beginning, of what the other tests leave of the processors.

use crate::cache::Cache;
use crate::cases::{self, Case};
use crate::children::lower_priority;
use crate::l1::{self, Host, Images};
use crate::nested::Kernel;
use crate::own_kernel;
use crate::programs::{self, Profile, Program};
use crate::report::Reporter;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// What is wanted.
pub struct Wanted {
    hosts: BTreeSet<Host>,
    /// Those whose own kernel is wanted, too.
    own_kernels: BTreeSet<Host>,
    causeway: Option<PathBuf>,
    profile: Profile,
}

impl Wanted {
    /// For these cases; `causeway` is the program where it is built already.
    pub fn by(cases: &[Case], causeway: Option<PathBuf>, profile: Profile) -> Self {
        let own = cases.iter().filter(|case| case.machine.kernel == Kernel::Own);
        Self {
            hosts: cases.iter().map(|case| case.machine.host).collect(),
            own_kernels: own.map(|case| case.machine.host).collect(),
            causeway,
            profile,
        }
    }
}

/// What every nested case needs.
pub struct Ready {
    pub cache: Cache,
    pub programs: Vec<Program>,
    /// Of each host, or why there are none.
    pub images: BTreeMap<Host, Result<Images>>,
}

/// Tells of each host's own kernel when it is in the host's [`Images`]; `false`: nobody has built it.
pub type OwnKernels = Receiver<(Host, Result<bool>)>;

/// What is being made.
pub struct Ahead {
    ready: Receiver<Result<Arc<Ready>>>,
    own_kernels: OwnKernels,
}

impl Ahead {
    /// Begins.
    pub fn start(cache: &Cache, wanted: Wanted, reporter: &Reporter) -> Result<Self> {
        let ((ready_sender, ready), (kernel_sender, own_kernels)) = (channel(), channel());
        let (cache, reporter) = (cache.clone(), reporter.clone());
        let make = move || {
            let made = lower_priority().and_then(|()| make(&cache, &wanted, &reporter)).map(Arc::new);
            let kept = made.as_ref().ok().cloned();
            // Whoever does not want it any more has ended.
            let _ = ready_sender.send(made);
            if let Some(ready) = kept {
                make_own_kernels(&ready, &wanted, &reporter, &kernel_sender);
            }
        };
        std::thread::Builder::new().name("ahead".to_owned()).spawn(make)?;
        Ok(Self { ready, own_kernels })
    }

    /// Waits for what every case needs; the own kernels may follow later.
    pub fn wait(self) -> Result<(Arc<Ready>, OwnKernels)> {
        let ready = self.ready.recv().context("what makes the bench ready has failed")??;
        Ok((ready, self.own_kernels))
    }
}

fn make(cache: &Cache, wanted: &Wanted, reporter: &Reporter) -> Result<Ready> {
    // The images first: they wait for the network and for one processor, while the other tests are built by both.
    let start = Instant::now();
    let images = wanted.hosts.iter().map(|host| (*host, l1::prepare(cache, *host))).collect();
    reporter.took("making the bench ready", start.elapsed());
    let start = Instant::now();
    let programs = programs::build(wanted.causeway.as_deref(), wanted.profile)?;
    reporter.took("building the static programs", start.elapsed());
    Ok(Ready { cache: cache.clone(), programs, images })
}

/// In CI the default host's is built; elsewhere building it is left to the user.
fn make_own_kernels(ready: &Ready, wanted: &Wanted, reporter: &Reporter, sender: &Sender<(Host, Result<bool>)>) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    for host in &wanted.own_kernels {
        let Some(Ok(images)) = ready.images.get(host) else { continue };
        let start = Instant::now();
        let make = || {
            let kernel = match own_kernel::built(images)? {
                None if cases::in_ci() && *host == Host::Default => Some(own_kernel::build(images, false, processors)?),
                built => built,
            };
            let own = kernel.map(|kernel| own_kernel::images(images, &kernel)).transpose()?;
            Ok(own.map(|own| images.own.get_or_init(|| own)).is_some())
        };
        let made = make();
        reporter.took("the own kernel", start.elapsed());
        let _ = sender.send((*host, made));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_kernels_are_those_of_the_cases() {
        let cases = ["", "# kernel: own\n", "# host: new\n"].map(|head| Case::parse("x", head).unwrap());
        let wanted = Wanted::by(&cases, None, Profile::Programs);
        assert_eq!(wanted.hosts, BTreeSet::from([Host::Default, Host::New]));
        assert_eq!(wanted.own_kernels, BTreeSet::from([Host::Default]));
    }
}
