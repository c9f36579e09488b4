//! The audit: what it found, said and put into the statistics.

use vtd::Audit;

use crate::machine::stats;

/// Says what an audit found: a line, and a line for each difference.
pub fn say(audit: &Audit) {
    let Audit { checked, pending, .. } = audit;
    match audit.differing() {
        0 => log::info!("audit: {checked} comparisons, {pending} pending, no difference"),
        differing => log::warn!("audit: {checked} comparisons, {pending} pending, {differing} differences"),
    }
    lines(audit).for_each(|line| log::warn!("audit: {line}"));
}

fn lines(audit: &Audit) -> impl Iterator<Item = String> {
    let more = (audit.more > 0).then(|| format!("and {} more", audit.more));
    audit.differences.iter().map(ToString::to_string).chain(more)
}

impl From<&Audit> for stats::Audit {
    fn from(audit: &Audit) -> Self {
        Self { checked: audit.checked, pending: audit.pending, differences: lines(audit).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vtd::Difference;

    #[test]
    fn differences_are_lines_and_what_is_not_listed_is_counted() {
        let mut audit = Audit { checked: 7, pending: 2, ..Audit::default() };
        (0..66).for_each(|n| audit.differ(Difference::Other(format!("difference {n}"))));
        let stats = stats::Audit::from(&audit);
        assert_eq!((stats.checked, stats.pending, stats.differences.len()), (7, 2, 65));
        assert_eq!(stats.differences[63..], ["difference 63", "and 2 more"]);
    }
}
