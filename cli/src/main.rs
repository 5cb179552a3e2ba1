//! The binary `fused-attention`: hands the arguments over and returns the exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(fused_attention_cli::main(std::env::args_os(), &mut std::io::stdout(), &mut std::io::stderr()))
}
