//! The difference between two texts, line by line.

/// A line of the difference: `-` for a removed line, `+` for an added line, and a space for a line of both texts.
pub(super) type Line<'a> = (char, &'a str);

/// Returns the lines of both texts, with the smallest number of changed lines. If this takes too much memory, the lines between the common
/// beginning and the common end are all removed and added. Returns `None` if the texts are equal.
pub(super) fn diff<'a>(old: &'a str, new: &'a str) -> Option<Vec<Line<'a>>> {
    if old == new {
        return None;
    }
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let equal = |(old, new): &(&&str, &&str)| old == new;
    let start = old.iter().zip(&new).take_while(equal).count();
    let (begin, old, new) = (&old[..start], &old[start..], &new[start..]);
    let end = old.iter().rev().zip(new.iter().rev());
    let end = end.take_while(equal).count();
    let (old, end) = old.split_at(old.len() - end);
    let new = &new[..new.len() - end.len()];
    let kept = |line: &&'a str| (' ', *line);
    let mut lines: Vec<_> = begin.iter().map(kept).collect();
    if (old.len() + 1).saturating_mul(new.len() + 1) <= CELLS {
        lines.extend(changes(old, new));
    } else {
        lines.extend(old.iter().map(|line| ('-', *line)));
        lines.extend(new.iter().map(|line| ('+', *line)));
    }
    lines.extend(end.iter().map(kept));
    Some(lines)
}

/// Returns the difference with the smallest number of changed lines.
fn changes<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<Line<'a>> {
    // common[at(i, j)] is the length of the longest common subsequence of the lines from i and from j on.
    let at = |i: usize, j: usize| i * (new.len() + 1) + j;
    let mut common = vec![0_u32; at(old.len() + 1, 0)];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[at(i, j)] = if old[i] == new[j] {
                common[at(i + 1, j + 1)] + 1
            } else {
                common[at(i + 1, j)].max(common[at(i, j + 1)])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[at(i + 1, j)] >= common[at(i, j + 1)])
        {
            lines.push(('-', old[i]));
            i += 1;
        } else {
            lines.push(('+', new[j]));
            j += 1;
        }
    }
    lines
}

/// Limit on the cells of the table of [`changes`], which take 16 MB. A service config that is formatted on several lines has up to about
/// 30 000 lines, and the table of two of them would take 4 GB.
const CELLS: usize = 4_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(old: &str, new: &str) -> String {
        let lines = diff(old, new).unwrap_or_default();
        let lines = lines
            .into_iter()
            .map(|(mark, line)| format!("{mark}{line} "));
        lines.collect()
    }

    #[test]
    fn changed_lines_are_marked() {
        assert_eq!(shown("a\nb\nc", "a\nx\nc"), " a -b +x  c ");
        assert_eq!(shown("", "a\nb"), "+a +b ");
        assert_eq!(shown("a\nb", ""), "-a -b ");
        assert_eq!(shown("a\nb\nc\nd", "b\nd\ne"), "-a  b -c  d +e ");
        assert_eq!(shown("a\na", "a"), " a -a ");
        assert_eq!(shown("a", "a\na"), " a +a ");
        assert_eq!(diff("a", "a"), None);
    }

    #[test]
    fn the_memory_for_long_texts_is_limited() {
        let text = |name: &str| -> String {
            let lines = (0..200_000).map(|line| format!("{name}{line}\n"));
            format!("begin\n{}end\n", lines.collect::<String>())
        };
        let (old, new) = (text("a"), text("b"));
        let lines = diff(&old, &new).expect("the texts differ");
        let marks: String = lines.iter().map(|(mark, _)| mark).collect();
        let (removed, added) = ("-".repeat(200_000), "+".repeat(200_000));
        assert_eq!(marks, format!(" {removed}{added} "));
        // One changed line needs a small table.
        let changed = old.replace("a70000\n", "b\n");
        let lines = diff(&old, &changed).expect("the texts differ");
        assert_eq!(lines.iter().filter(|(mark, _)| *mark != ' ').count(), 2);
    }
}
