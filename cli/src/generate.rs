//! `completions` and `man`: files that are generated from the command line.

use std::io;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::Failure;
use crate::output::Output;

pub(crate) fn completions(shell: Shell, output: &mut Output) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tonic-etcd", &mut script);
    output.write(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints one page with all commands, because a page for each command would need a directory and not a pipe.
pub(crate) fn man(output: &mut Output) -> Result<ExitCode, Failure> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    sections("tonic-etcd", &command, &mut page)?;
    output.write(&page)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the sections of all commands below a command.
fn sections(name: &str, command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    for subcommand in command.get_subcommands() {
        if subcommand.get_name() == "help" {
            continue;
        }
        let name = format!("{name} {}", subcommand.get_name());
        let man = clap_mangen::Man::new(subcommand.clone().display_name(name.clone()));
        man.render_name_section(page)?;
        man.render_synopsis_section(page)?;
        man.render_options_section(page)?;
        sections(&name, subcommand, page)?;
    }
    Ok(())
}
