//! Tables for people: on the terminal and in Markdown.

/// Columns as wide as their widest cell, the first one to the left.
pub fn plain(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths = widths(head, rows);
    let mut text = line(&head.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>(), &widths, "  ");
    text += &line(&widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>(), &widths, "  ");
    for row in rows {
        text += &line(row, &widths, "  ");
    }
    text
}

pub fn markdown(head: &[&str], rows: &[Vec<String>]) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = row(&head.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>());
    text += &row(&vec!["---".to_owned(); head.len()]);
    text.extend(rows.iter().map(|cells| row(cells)));
    text
}

fn widths(head: &[&str], rows: &[Vec<String>]) -> Vec<usize> {
    let cell = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |text| text.chars().count());
    (0..head.len())
        .map(|c| rows.iter().map(|row| cell(row, c)).chain([head[c].chars().count()]).max().unwrap_or(0))
        .collect()
}

fn line(cells: &[String], widths: &[usize], between: &str) -> String {
    let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
    format!("{}\n", padded.join(between).trim_end())
}

/// Digits in groups of three.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "22".to_owned()]];
        assert_eq!(plain(&["what", "value"], &rows), "what  value\n----  -----\na     1\nlong  22\n");
        assert_eq!(markdown(&["w", "v"], &rows[..1]), "| w | v |\n| --- | --- |\n| a | 1 |\n");
        assert_eq!(
            (grouped(16416), grouped(7), grouped(1_000_000)),
            ("16,416".to_owned(), "7".to_owned(), "1,000,000".to_owned())
        );
    }
}
