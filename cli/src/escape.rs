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

/// Escapes the same characters in a JSON document, as JSON does: `\uXXXX`, and a surrogate pair above U+FFFF. The result has the same value.
/// Outside of strings, JSON has only ASCII. serde has escaped the ASCII control characters in strings, except for DEL.
pub(crate) fn escaped_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for letter in json.chars() {
        if letter >= '\u{7f}' && (letter.is_control() || is_invisible(letter)) {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                let _ = write!(escaped, "\\u{unit:04x}");
            }
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

/// Returns whether a terminal shows nothing for the character, or shows other characters in another order because of it: the characters that
/// Unicode ignores by default (`Default_Ignorable_Code_Point`), the separators of lines, and the annotations.
fn is_invisible(letter: char) -> bool {
    matches!(letter,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}')
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
        for hidden in ["\u{61c}", "\u{fe0f}", "\u{e0100}", "\u{3164}", "\u{fff9}"] {
            assert!(escaped(hidden).starts_with("\\u{"), "{hidden:?}");
        }
    }

    #[test]
    fn a_json_document_keeps_its_value_and_has_no_character_that_controls_the_terminal() {
        let text =
            "\u{1b}[2J\u{7f}\u{9b}31m\u{202e}\u{200d}\u{e0041}\u{1d173} grüße 世界 \u{1f600}\n\"\\";
        let value = serde_json::json!({ text: [text, 1] });
        let pretty = serde_json::to_string_pretty(&value).expect("JSON");
        let escaped = escaped_json(&pretty);
        assert_eq!(
            escaped_json("\"\u{7f}\u{e0041}\""),
            r#""\u007f\udb40\udc41""#
        );
        let parsed: serde_json::Value = serde_json::from_str(&escaped).expect("JSON");
        assert_eq!(parsed, value);
        let mut letters = escaped.chars().filter(|letter| *letter != '\n');
        assert!(!letters.any(|letter| letter.is_control() || is_invisible(letter)));
        assert!(escaped.contains("grüße 世界 \u{1f600}"), "{escaped}");
        assert_eq!(escaped.lines().count(), pretty.lines().count());
    }
}
