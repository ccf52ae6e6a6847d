//! The `quantune` binary. All of it is in the library's [`quantune::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    quantune::cli::main()
}
