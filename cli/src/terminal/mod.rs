//! A picture on the terminal. `line.rs` builds its lines as text, and `screen.rs` shows them.

mod line;
mod screen;

pub(crate) use line::{Canvas, Line, Style, cut};
pub(crate) use screen::Screen;
