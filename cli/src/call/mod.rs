//! `call`: unary calls with JSON messages, over the balanced channel, with the message types of the server's reflection service.

mod arguments;
mod codec;
mod command;
mod latencies;
mod load;
mod reflection;

pub(crate) use arguments::CallArguments;
pub(crate) use command::run;
