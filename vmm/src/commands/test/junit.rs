//! Results as JUnit XML, as CI systems read it.

use std::fs;
use std::io;
use std::path::Path;

use super::{Outcome, Verdict};

/// Text in an attribute or an element. Control characters that XML cannot have become a replacement character.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(character),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

fn text(outcomes: &[Outcome]) -> String {
    let count = |wanted: fn(&Verdict) -> bool| outcomes.iter().filter(|outcome| wanted(&outcome.verdict)).count();
    let time: f64 = outcomes.iter().map(|outcome| outcome.time.as_secs_f64()).sum();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"images\" tests=\"{}\" failures=\"{}\" skipped=\"{}\" \
         errors=\"0\" time=\"{time:.3}\">\n",
        outcomes.len(),
        count(|verdict| matches!(verdict, Verdict::Failed(_))),
        count(|verdict| matches!(verdict, Verdict::Skipped(_))),
    );
    for Outcome { test, verdict, time, log } in outcomes {
        let head = format!(
            "<testcase classname=\"images\" name=\"{}\" time=\"{:.3}\"",
            escape(&test.name),
            time.as_secs_f64()
        );
        let rests_on = test.rests_on.as_ref().map_or_else(String::new, |what| {
            format!("<properties><property name=\"rests-on\" value=\"{}\"/></properties>", escape(what))
        });
        let result = match verdict {
            Verdict::Passed => String::new(),
            Verdict::Skipped(why) => format!("<skipped message=\"{}\"/>", escape(why)),
            Verdict::Failed(why) => format!("<failure message=\"{}\">{}</failure>", escape(why), escape(log)),
        };
        text.push_str(&format!("{head}>{rests_on}{result}</testcase>\n"));
    }
    text.push_str("</testsuite>\n");
    text
}

/// Writes the results to `file`.
pub fn write(file: &Path, outcomes: &[Outcome]) -> io::Result<()> {
    fs::write(file, text(outcomes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Test;
    use super::*;

    #[test]
    fn results_are_elements_and_their_text_is_escaped() {
        let outcome = |name: &str, verdict, log: &str| Outcome {
            test: Test { rests_on: (name == "a").then(|| "VT-d 7.2 & 7.3".to_owned()), ..Test::named(name) },
            verdict,
            time: Duration::from_millis(50),
            log: log.to_owned(),
        };
        let text = text(&[
            outcome("a", Verdict::Passed, ""),
            outcome("b", Verdict::Failed("1 < 2 & \"x\"".to_owned()), "\u{1b}[1mred"),
            outcome("c", Verdict::Skipped("why".to_owned()), ""),
        ]);
        assert!(text.contains("tests=\"3\" failures=\"1\" skipped=\"1\""));
        let rests_on = "<properties><property name=\"rests-on\" value=\"VT-d 7.2 &amp; 7.3\"/></properties>";
        assert!(text.contains(&format!("name=\"a\" time=\"0.050\">{rests_on}</testcase>")));
        assert!(text.contains("message=\"1 &lt; 2 &amp; &quot;x&quot;\">\u{fffd}[1mred</failure>"));
        assert!(text.contains("<skipped message=\"why\"/>"));
    }
}
