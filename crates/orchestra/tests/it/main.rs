//! The binary as users run it: real servers, proxies, shims and programs, in a hermetic home per test.
//!
//! | module | what it proves |
//! |---|---|
//! | [`tour`] | every command does what it says, with its exit codes and JSON |
//! | [`order`] | dependencies, checks, and what a lost dependency means |
//! | [`load`] | no request and no stream is lost while releases roll and parts are killed |
//! | [`rollouts`] | canary, blue-green and hold, with verdicts, people, newer releases and crashes |
//! | [`deploys`] | deploys of every strategy under load, with faults in a third of them: no request is lost |
//! | [`scaling`] | a service that sleeps, is woken, grows and shrinks: no request is lost |
//! | [`flags`] | feature flags: changes without a restart, overrides, answers while parts are dead |
//! | [`kill`] | any part killed at random moments: the next command converges |
//! | [`boundary`] | the server killed at every single journal boundary of an `up` |
//! | [`hostile`] | two of everything, full disks, garbage, replaced binaries, huge and escaping output |
//! | [`readme`] | the tour of the README, and every command that the book names |
//! | [`remote`] | the API over TCP with a token; everything is there again after a reboot |
//! | [`llm_chat`] | a real language model behind a stable address, updated in the middle of a stream |
//! | [`torture`] | programs that do not want to die, and every byte they write |

mod boundary;
mod deploys;
mod environment;
mod flags;
mod hostile;
mod kill;
mod llm_chat;
mod load;
mod order;
mod processes;
mod readme;
mod remote;
mod rollouts;
mod scaling;
mod torture;
mod tour;
