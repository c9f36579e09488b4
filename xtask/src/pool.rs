//! Which L1 runs which case. Several L1s stand side by side, and each asks for its next case when it is done with one,
//! so that none is idle while another has cases left.

use crate::cases::Case;
use crate::l1::Host;
use crate::nested::{Kernel, Machine};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The cases that no L1 has taken yet, by the L1 that they need.
pub struct Pool {
    groups: Mutex<Vec<Group>>,
    /// A kernel is there, or will not be.
    changed: Condvar,
}

struct Group {
    machine: Machine,
    /// The longest ones last.
    cases: Vec<Case>,
    /// How many L1s there are for them.
    l1s: usize,
    /// The kernel that they need is there.
    has_kernel: bool,
}

impl Group {
    fn weight(&self) -> u64 {
        self.cases.iter().map(|case| case.limit).sum()
    }

    /// An L1 takes its time to boot: not for a case that another one is about to take.
    fn wants_an_l1(&self) -> bool {
        self.has_kernel && self.cases.len() > self.l1s
    }
}

impl Pool {
    pub fn new(cases: Vec<Case>) -> Self {
        let mut groups: BTreeMap<Machine, Vec<Case>> = BTreeMap::new();
        for case in cases {
            groups.entry(case.machine.clone()).or_default().push(case);
        }
        let group = |(machine, mut cases): (Machine, Vec<Case>)| {
            // In the order of their names where they are as long.
            cases.sort_by(|a, b| a.limit.cmp(&b.limit).then_with(|| b.name.cmp(&a.name)));
            let has_kernel = machine.kernel != Kernel::Own;
            Group { machine, cases, l1s: 0, has_kernel }
        };
        Self { groups: Mutex::new(groups.into_iter().map(group).collect()), changed: Condvar::new() }
    }

    fn groups(&self) -> MutexGuard<'_, Vec<Group>> {
        // Every change is whole at each moment, whoever panics.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The L1 that a lane boots next, for the cases that need such a one; waits where all that is left needs a kernel
    /// that is not there yet. None: there are no more.
    pub fn next_l1(&self) -> Option<Machine> {
        let mut groups = self.groups();
        loop {
            // Every boot costs: an L1 of another kind first, then a second one of a kind that has much to do.
            let next = groups
                .iter_mut()
                .filter(|group| group.wants_an_l1())
                .max_by_key(|group| (std::cmp::Reverse(group.l1s), group.weight()));
            if let Some(group) = next {
                group.l1s += 1;
                return Some(group.machine.clone());
            }
            if groups.iter().all(|group| group.has_kernel) {
                return None;
            }
            groups = self.changed.wait(groups).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The own kernel of that host is there, or will not be; `able` takes out what cannot be run. What does not wait
    /// for it is not touched.
    pub fn own_kernel_is_made(&self, host: Host, able: impl Fn(Vec<Case>) -> Vec<Case>) {
        let waiting = |group: &&mut Group| !group.has_kernel && group.machine.host == host;
        for group in self.groups().iter_mut().filter(waiting) {
            group.cases = able(std::mem::take(&mut group.cases));
            group.has_kernel = true;
        }
        self.changed.notify_all();
    }

    /// The next case for an L1 of this kind.
    pub fn take(&self, machine: &Machine) -> Option<Case> {
        self.groups().iter_mut().find(|group| group.machine == *machine)?.cases.pop()
    }

    /// Such an L1 has ended.
    pub fn ended(&self, machine: &Machine) {
        if let Some(group) = self.groups().iter_mut().find(|group| group.machine == *machine) {
            group.l1s -= 1;
        }
    }

    /// Takes out all that needs such an L1, which there is not.
    pub fn give_up(&self, machine: &Machine) -> Vec<Case> {
        let mut groups = self.groups();
        groups
            .iter_mut()
            .find(|group| group.machine == *machine)
            .map(|group| std::mem::take(&mut group.cases))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str, head: &str) -> Case {
        Case::parse(name, head).unwrap()
    }

    fn machine(head: &str) -> Machine {
        case("m", head).machine
    }

    fn pool(cases: &[(&str, &str)]) -> Pool {
        Pool::new(cases.iter().map(|(name, head)| case(name, head)).collect())
    }

    const PORTS: &str = "# topology: ports\n";
    const OWN: &str = "# kernel: own\n";

    #[test]
    fn the_longest_case_is_taken_first_and_equal_ones_by_name() {
        let pool = pool(&[("b", ""), ("c", "# limit: 900\n"), ("a", "")]);
        let flat = machine("");
        let taken: Vec<String> = std::iter::from_fn(|| pool.take(&flat)).map(|case| case.name).collect();
        assert_eq!(taken, ["c", "a", "b"]);
        assert!(pool.take(&machine(PORTS)).is_none());
    }

    #[test]
    fn each_kind_has_its_l1_before_one_has_two() {
        let pool = pool(&[
            ("a", ""),
            ("b", ""),
            ("c", ""),
            ("p", "# topology: ports\n# limit: 2000\n"),
            ("s", "# topology: slot\n"),
        ]);
        let l1s: Vec<Machine> = std::iter::from_fn(|| pool.next_l1()).collect();
        // Nobody has taken a case yet: a third one of the first kind, for its third case, and no second one where there
        // is one case.
        let flat = machine("");
        assert_eq!(l1s, [machine(PORTS), flat.clone(), machine("# topology: slot\n"), flat.clone(), flat]);
    }

    #[test]
    fn no_l1_is_booted_for_a_case_that_another_is_about_to_take() {
        let pool = pool(&[("a", ""), ("b", "")]);
        let flat = machine("");
        assert_eq!(pool.next_l1(), Some(flat.clone()));
        assert!(pool.take(&flat).is_some());
        assert_eq!(pool.next_l1(), None);
        // It died, and the other case is still to be run.
        pool.ended(&flat);
        assert_eq!(pool.next_l1(), Some(flat.clone()));
        assert!(pool.take(&flat).is_some());
        pool.ended(&flat);
        assert_eq!(pool.next_l1(), None);
    }

    #[test]
    fn whoever_has_nothing_else_to_do_waits_for_the_own_kernel() {
        let pool = pool(&[("a", ""), ("x", OWN), ("y", &format!("{OWN}{PORTS}")), ("z", OWN)]);
        assert_eq!(pool.next_l1(), Some(machine("")));
        assert!(pool.take(&machine("")).is_some());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.next_l1());
            pool.own_kernel_is_made(Host::Default, |mut cases| {
                cases.retain(|case| case.name != "y");
                cases
            });
            assert_eq!(waiting.join().unwrap(), Some(machine(OWN)));
        });
        assert_eq!(pool.next_l1(), Some(machine(OWN)));
        assert_eq!(pool.next_l1(), None);
    }

    #[test]
    fn each_host_has_an_own_kernel() {
        let new = format!("{OWN}# host: new\n");
        let pool = pool(&[("x", OWN), ("y", &new)]);
        pool.own_kernel_is_made(Host::New, |cases| cases);
        assert_eq!(pool.next_l1(), Some(machine(&new)));
        pool.own_kernel_is_made(Host::Default, |cases| cases);
        assert_eq!(pool.next_l1(), Some(machine(OWN)));
        assert_eq!(pool.next_l1(), None);
    }

    #[test]
    fn cases_of_a_kernel_that_there_will_not_be_are_given_up() {
        let pool = pool(&[("x", OWN)]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.next_l1());
            pool.own_kernel_is_made(Host::Default, |cases| {
                assert_eq!(cases.len(), 1);
                Vec::new()
            });
            assert_eq!(waiting.join().unwrap(), None);
        });
        assert!(pool.give_up(&machine(OWN)).is_empty());
    }

    #[test]
    fn what_needs_an_l1_that_does_not_come_up_is_given_up() {
        let pool = pool(&[("a", ""), ("b", ""), ("p", PORTS)]);
        assert_eq!(pool.next_l1(), Some(machine("")));
        let names: Vec<String> = pool.give_up(&machine("")).into_iter().map(|case| case.name).collect();
        assert_eq!(names, ["b", "a"]);
        pool.ended(&machine(""));
        assert_eq!(pool.next_l1(), Some(machine(PORTS)));
        assert_eq!(pool.next_l1(), None);
    }
}
