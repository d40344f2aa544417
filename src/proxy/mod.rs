//! Level 5: the path of one request.
//!
//! In the order in which a request meets them: `serve` (hyper), [`pipeline`] (which rule comes when), `target` and
//! `fields` (what may pass), `ties` (its deadline, and what it has to do with other requests), `tries` (whether one
//! more follows), `trial` (what a try says about the callee), `attempt` (one try at one endpoint), `reach` (a
//! connection to it), `fault` (what goes wrong there on purpose), `body` (the answer on its way), `refusal` (what we
//! say instead), `grpc`, `upgrade`. `worker` is what all of one worker's requests share and `live` what one request
//! holds.

pub mod answer;
pub mod attempt;
pub mod body;
pub mod caller;
pub mod fault;
pub mod fields;
pub mod grpc;
pub mod held;
pub mod live;
pub mod patience;
pub mod pipeline;
pub mod reach;
pub mod refusal;
pub mod serve;
pub mod target;
pub mod ties;
pub mod trial;
pub mod tries;
pub mod tunnel;
pub mod upgrade;
pub mod watch;
pub mod worker;
