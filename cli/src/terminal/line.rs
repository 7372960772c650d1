//! The lines of a picture, as text of a given width. This file has no I/O.

use std::fmt::Write;

/// The size of a terminal, and whether it shows colours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Canvas {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) colour: bool,
}

/// A line: texts with their styles.
#[derive(Debug, Default)]
pub(crate) struct Line(Vec<(Style, String)>);

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Style {
    Plain,
    Bold,
    Dim,
    Green,
    Yellow,
    Red,
}

impl Line {
    pub(crate) fn of(style: Style, text: impl Into<String>) -> Self {
        Self(vec![(style, text.into())])
    }

    /// Creates a line with two blanks between its texts.
    pub(crate) fn spaced(texts: impl IntoIterator<Item = (Style, String)>) -> Self {
        let mut line = Vec::new();
        for text in texts {
            if !line.is_empty() {
                line.push((Style::Plain, "  ".to_owned()));
            }
            line.push(text);
        }
        Self(line)
    }

    /// Returns the line with control characters escaped, and cut to the width of the canvas. A line that is cut ends with `…`.
    pub(crate) fn render(&self, canvas: Canvas) -> String {
        let texts = self.0.iter();
        let texts: Vec<_> = texts.map(|(style, text)| (*style, escaped(text))).collect();
        let whole: usize = texts.iter().map(|(_, text)| text.chars().count()).sum();
        let is_cut = whole > canvas.width;
        let mut room = canvas.width.saturating_sub(usize::from(is_cut));
        let mut line = String::new();
        for (style, text) in texts {
            let part: String = text.chars().take(room).collect();
            room -= part.chars().count();
            match style.code() {
                Some(code) if canvas.colour && !part.is_empty() => {
                    let _ = write!(line, "\x1b[{code}m{part}\x1b[0m");
                }
                _ => line += &part,
            }
        }
        if is_cut && canvas.width > 0 {
            line.push('…');
        }
        line.trim_end().to_owned()
    }
}

impl Style {
    /// Returns the parameter of the sequence SGR (Select Graphic Rendition) of ECMA-48.
    fn code(self) -> Option<u8> {
        match self {
            Self::Plain => None,
            Self::Bold => Some(1),
            Self::Dim => Some(2),
            Self::Red => Some(31),
            Self::Green => Some(32),
            Self::Yellow => Some(33),
        }
    }
}

/// Returns at most `width` columns of a text, with control characters escaped. A text that is cut ends with `…`.
pub(crate) fn cut(text: &str, width: usize) -> String {
    let text = escaped(text);
    if text.chars().count() <= width {
        return text;
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        short.push('…');
    }
    short
}

/// Escapes everything except printable ASCII and Latin letters. Text from etcd or from a server could otherwise control the terminal, or
/// take another number of columns than it has characters.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii_graphic() || matches!(letter, ' ' | '…' | '\u{c0}'..='\u{24f}') {
            escaped.push(letter);
        } else {
            let _ = write!(escaped, "{}", letter.escape_unicode());
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANVAS: Canvas = Canvas {
        width: 12,
        height: 1,
        colour: false,
    };

    fn line() -> Line {
        Line::spaced([
            (Style::Green, "READY".to_owned()),
            (Style::Plain, "10.0.0.5".to_owned()),
        ])
    }

    #[test]
    fn a_line_is_cut_to_the_width_and_marked() {
        assert_eq!(line().render(CANVAS), "READY  10.0…");
        for width in 0..20 {
            let text = line().render(Canvas { width, ..CANVAS });
            assert!(text.chars().count() <= width, "{width}: {text}");
        }
        assert_eq!(cut("a-long-name", 6), "a-lon…");
        assert_eq!(cut("name", 6), "name");
        assert_eq!(cut("name", 0), "");
    }

    #[test]
    fn colours_add_no_columns_and_are_absent_if_they_are_disabled() {
        let colour = Canvas {
            colour: true,
            ..CANVAS
        };
        assert_eq!(line().render(colour), "\u{1b}[32mREADY\u{1b}[0m  10.0…");
        assert!(!line().render(CANVAS).contains('\u{1b}'));
    }

    #[test]
    fn text_can_neither_control_the_terminal_nor_change_its_own_width() {
        let wide = Canvas {
            width: 100,
            ..CANVAS
        };
        let hostile = Line::of(Style::Plain, "a\u{1b}[2J\r\n\u{9b}31m\u{202e}\u{4e16}ü");
        assert_eq!(
            hostile.render(wide),
            "a\\u{1b}[2J\\u{d}\\u{a}\\u{9b}31m\\u{202e}\\u{4e16}ü"
        );
        assert_eq!(cut("\u{1b}", 4), "\\u{…");
    }
}
