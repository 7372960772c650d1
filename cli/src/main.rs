//! The command `tonic-etcd`: lists, checks, registers, watches, drains and calls gRPC servers that are registered in etcd.

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use error::Failure;
use output::Output;

mod bounded;
mod call;
mod cli;
mod config;
mod connection;
mod control;
mod control_keys;
mod doctor;
mod error;
mod escape;
mod generate;
mod keys;
mod ls;
mod options;
mod output;
mod probe;
mod register;
mod services;
mod table;
mod terminal;
mod watch;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(Failure::local(format!("cannot start the runtime: {error}"))),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            failure.print();
            failure.exit_code()
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let options = cli.options;
    let mut output = Output::stdout(options.json);
    match cli.command {
        Command::Services => services::run(&options, &mut output).await,
        Command::Ls(arguments) => ls::run(&options, &arguments, &mut output).await,
        Command::Doctor(arguments) => doctor::run(&options, &arguments, &mut output).await,
        Command::Register(arguments) => register::run(&options, arguments).await,
        Command::Watch(arguments) => watch::run(&options, &arguments, &mut output).await,
        Command::Drain(arguments) => control::drain(&options, &arguments, &mut output).await,
        Command::Resume(arguments) => control::resume(&options, &arguments, &mut output).await,
        Command::Weight(arguments) => control::weight(&options, &arguments, &mut output).await,
        Command::Config(command) => config::run(&options, &command, &mut output).await,
        Command::Call(arguments) => call::run(&options, &arguments, &mut output).await,
        Command::Completions { shell } => generate::completions(shell, &mut output),
        Command::Man => generate::man(&mut output),
    }
}
