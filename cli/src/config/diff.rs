//! The difference between two texts, line by line.

/// A line of the difference: `-` for a removed line, `+` for an added line, and a space for a line of both texts.
pub(super) type Line<'a> = (char, &'a str);

/// Returns the lines of both texts, with the smallest number of changed lines. Returns `None` if the texts are equal.
pub(super) fn diff<'a>(old: &'a str, new: &'a str) -> Option<Vec<Line<'a>>> {
    if old == new {
        return None;
    }
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    // common[i][j] is the length of the longest common subsequence of the lines from i and from j on.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(('-', old[i]));
            i += 1;
        } else {
            lines.push(('+', new[j]));
            j += 1;
        }
    }
    Some(lines)
}

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
        assert_eq!(diff("a", "a"), None);
    }
}
