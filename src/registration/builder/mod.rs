//! The options of a registration, and their checks.

mod address;
mod check;
mod registration_builder;
mod serve_options;

pub use registration_builder::RegistrationBuilder;
