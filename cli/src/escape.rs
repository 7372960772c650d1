//! Escapes external text for the terminal.

use std::fmt::Write;

/// Escapes control characters, invisible characters and characters that change the direction of text. Text from etcd or from a server could
/// otherwise move the cursor, change the colours, or hide a part of a line.
pub(crate) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() || is_invisible(letter) {
            let _ = write!(escaped, "{}", letter.escape_unicode());
        } else {
            escaped.push(letter);
        }
    }
    escaped
}

/// Returns bytes as escaped text. Bytes that are not UTF-8 are replaced.
pub(crate) fn escaped_bytes(bytes: &[u8]) -> String {
    escaped(&String::from_utf8_lossy(bytes))
}

fn is_invisible(letter: char) -> bool {
    matches!(letter,
        '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_text_can_neither_control_the_terminal_nor_hide_text() {
        assert_eq!(escaped("a\u{1b}[2Jb\nc\r"), "a\\u{1b}[2Jb\\u{a}c\\u{d}");
        assert_eq!(escaped("a\u{202e}b\u{200b}"), "a\\u{202e}b\\u{200b}");
        assert_eq!(escaped("\u{9b}31m"), "\\u{9b}31m");
        assert_eq!(escaped("grüße 10.0.0.5:80"), "grüße 10.0.0.5:80");
        assert_eq!(escaped_bytes(&[b'a', 0xff]), "a\u{fffd}");
    }
}
