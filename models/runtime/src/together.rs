//! Answers that come and go: continuous batching over one cache. A prompt joins between two steps, is read in chunks
//! beside the rows that are being decoded, and leaves when its answers end or nobody wants them any more.
//!
//! Each answer has its own sampling, seed and stop texts (`row.rs`), and its own row of the cache. What it says does not
//! depend on the others but for rounding: a step of one row and a step of several may run on other kernels, whose sums
//! differ in the last bits, and two tokens that are about as probable may then change places. `generate.rs` takes
//! prompts that are all there at the start.

use std::{fmt, rc::Rc};

use crate::{
    adapt::PreparedAdapter,
    cache::Cache,
    cancel::{Cancel, Run},
    conversation::Prompt,
    generate::{GenerateOptions, Generated, capacity},
    infer::{InferError, Lane, check_prompt, check_tokens, chunk_end},
    model::Model,
    row::Row,
    sample_token::best,
};

/// Rows of the cache end at a multiple of this, so that a prompt a little longer than the last needs no new cache.
const CAPACITY_STEP: usize = 64;

/// Names what was asked; the caller gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Spoken {
    /// The text that it adds; none while its last character is incomplete.
    pub text: String,
    /// Log-probability under the network's own distribution.
    pub logprob: f32,
    /// The most probable tokens at its place, the best first.
    pub alternatives: Vec<Alternative>,
}

/// What could have been chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// The text that it would add.
    pub text: String,
    /// Log-probability under the network's own distribution.
    pub logprob: f32,
}

/// What becomes of an answer in a step.
#[derive(Debug)]
pub enum Said<'t> {
    /// More text. The pieces of an answer make up its text.
    Text(&'t str),
    /// The token behind it, where tokens were asked for; one that ends the answer is not told.
    Token(Spoken),
    /// The answer is whole.
    Ended(Generated),
    /// There will be no answer; others are not concerned.
    Failed(InferError),
}

/// Receives what becomes of each answer: whose, which of its answers, and what.
pub type OnSaid<'f> = &'f mut dyn FnMut(Ticket, usize, Said<'_>);

/// Answers under one adapter that are decoded side by side.
pub struct Together<'m> {
    model: &'m Model,
    adapter: PreparedAdapter,
    reading: Option<Reading>,
    lane: Option<Lane>,
    /// One for each row of the lane; an empty one decodes a pad token to nobody.
    seats: Vec<Option<Seat<'m>>>,
}

/// What was asked.
struct Asked {
    ticket: Ticket,
    ids: Vec<u32>,
    options: GenerateOptions,
    answers: usize,
    alternatives: Option<usize>,
    /// Positions of the cache that each answer needs.
    capacity: usize,
}

/// A prompt that is being read, or whose answers wait for seats.
struct Reading {
    asked: Rc<Asked>,
    lane: Lane,
    read: usize,
    /// Behind the whole prompt.
    logits: Vec<f32>,
    seated: usize,
}

/// An answer that is being decoded.
struct Seat<'m> {
    asked: Rc<Asked>,
    answer: usize,
    row: Row<'m>,
}

impl<'m> Together<'m> {
    /// Nothing to answer yet.
    pub fn new(model: &'m Model, adapter: &PreparedAdapter) -> Self {
        Self { model, adapter: adapter.clone(), reading: None, lane: None, seats: Vec::new() }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.reading.is_none() && self.answering() == 0
    }

    /// Whether another prompt can be asked now: one is read at a time.
    pub fn takes_more(&self) -> bool {
        self.reading.is_none()
    }

    /// Answers that are being decoded.
    pub fn answering(&self) -> usize {
        self.seats.iter().flatten().count()
    }

    /// Asks for some answers to a prompt; answer `i` draws the random numbers that row `i` of a call of
    /// [`Model::generate`] would. With `alternatives`, tokens are told too, each with so many others. Nothing is run
    /// before [`Self::step`]. An earlier prompt that is still read is forgotten: ask [`Self::takes_more`] first.
    pub fn ask(
        &mut self,
        ticket: Ticket,
        prompt: &Prompt,
        options: &GenerateOptions,
        answers: usize,
        alternatives: Option<usize>,
    ) -> Result<(), InferError> {
        options.check()?;
        check_tokens(self.model, 0, &options.begin)?;
        check_prompt(self.model, 0, &prompt.ids, self.model.context() - 1)?;
        if self.adapter.model() != self.model.identity() {
            return Err(InferError::Foreign { what: "adapter", owner: "model" });
        }
        let ids = prompt.ids.clone();
        let capacity =
            capacity(self.model, &ids, options).next_multiple_of(CAPACITY_STEP).min(self.model.context());
        let lane = Lane::new(self.model, &self.adapter, 1, ids.len())?;
        let options = options.clone();
        let asked = Rc::new(Asked { ticket, ids, options, answers, alternatives, capacity });
        self.reading = Some(Reading { asked, lane, read: 0, logits: Vec::new(), seated: 0 });
        Ok(())
    }

    /// Forgets what was asked under a ticket: nobody wants it any more.
    pub fn leave(&mut self, ticket: Ticket) {
        self.reading.take_if(|reading| reading.asked.ticket == ticket);
        for seat in &mut self.seats {
            seat.take_if(|seat| seat.asked.ticket == ticket);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.reading, self.lane) = (None, None);
        self.seats.clear();
    }

    /// One chunk of the prompt that is read, and one token of each answer. After an error, [`Self::clear`]: what was
    /// under way cannot go on.
    pub fn step(&mut self, cancel: &Cancel, on_said: OnSaid<'_>) -> Result<(), InferError> {
        let run = Run::new(cancel)?;
        self.read_on(&run)?;
        self.seat(on_said)?;
        self.decode(&run, on_said)?;
        self.tidy()
    }

    fn read_on(&mut self, run: &Run) -> Result<(), InferError> {
        let Some(Reading { asked, lane, read, logits, .. }) = &mut self.reading else { return Ok(()) };
        if *read < asked.ids.len() {
            let end = chunk_end(self.model, *read, asked.ids.len());
            let wanted = [asked.ids.len() - 1];
            lane.read(run, &asked.ids[..end], *read, &wanted, |_, from| {
                logits.extend_from_slice(from);
                Ok(())
            })?;
            *read = end;
        }
        Ok(())
    }

    /// Seats the answers to a prompt that was read, as long as there is room.
    fn seat(&mut self, on_said: OnSaid<'_>) -> Result<(), InferError> {
        let Some(mut reading) = self.reading.take() else { return Ok(()) };
        let asked = Rc::clone(&reading.asked);
        let is_read = reading.read == asked.ids.len();
        while is_read && reading.seated < asked.answers {
            let Some(place) = self.make_room(asked.capacity)? else { break };
            let row = Row::new(self.model, &asked.options, reading.seated, asked.ids.len());
            let mut seat = Seat { asked: Rc::clone(&asked), answer: reading.seated, row };
            reading.seated += 1;
            if seat.choose(&reading.logits, on_said)
                && let Some(lane) = &mut self.lane
            {
                lane.cache.copy_row(place, &reading.lane.cache, 0, asked.ids.len())?;
                self.seats[place] = Some(seat);
            }
        }
        if reading.seated < asked.answers {
            self.reading = Some(reading);
        }
        Ok(())
    }

    /// A free row of the cache that holds so many tokens, if there may be one. Rows double, so that the cache is rarely
    /// made anew.
    fn make_room(&mut self, wanted: usize) -> Result<Option<usize>, InferError> {
        let has = self.lane.as_ref().map_or(0, |lane| lane.cache.capacity);
        if let Some(free) = self.seats.iter().position(Option::is_none).filter(|_| wanted <= has) {
            return Ok(Some(free));
        }
        let (answering, options) = (self.answering(), self.model.options());
        let capacity = self.capacity().max(wanted);
        let bytes = Cache::row_bytes(self.model.manifest(), capacity).max(1);
        let rows_max = (self.model.cache_bytes_max() / bytes).clamp(1, options.batch_max);
        if answering >= rows_max {
            return Ok(None);
        }
        self.move_to((answering + 1).next_power_of_two().min(rows_max), capacity)?;
        Ok(Some(answering))
    }

    /// Tokens that the longest of the rows may reach.
    fn capacity(&self) -> usize {
        self.seats.iter().flatten().map(|seat| seat.asked.capacity).max().unwrap_or(0)
    }

    /// The answers at the beginning of a cache of another size.
    fn move_to(&mut self, rows: usize, capacity: usize) -> Result<(), InferError> {
        let mut lane = Lane::new(self.model, &self.adapter, rows, capacity)?;
        let mut seats = Vec::with_capacity(rows);
        for (from, seat) in self.seats.drain(..).enumerate() {
            if let (Some(seat), Some(old)) = (seat, &self.lane) {
                lane.cache.copy_row(seats.len(), &old.cache, from, seat.row.length)?;
                seats.push(Some(seat));
            }
        }
        seats.resize_with(rows, || None);
        (self.lane, self.seats) = (Some(lane), seats);
        Ok(())
    }

    fn decode(&mut self, run: &Run, on_said: OnSaid<'_>) -> Result<(), InferError> {
        let (true, Some(lane)) = (self.seats.iter().any(Option::is_some), &mut self.lane) else {
            return Ok(());
        };
        let manifest = self.model.manifest();
        let pad = manifest.tokens.pad;
        let last =
            |seat: &Option<Seat<'_>>| seat.as_ref().map_or((pad, 0), |seat| (seat.row.last, seat.row.length));
        let (tokens, lengths): (Vec<u32>, Vec<usize>) = self.seats.iter().map(last).unzip();
        let logits = lane.decode(run, &tokens, &lengths)?;
        for (place, logits) in self.seats.iter_mut().zip(logits.chunks_exact(manifest.model.vocab_size)) {
            place.take_if(|seat| {
                seat.row.length += 1;
                !seat.choose(logits, on_said)
            });
        }
        Ok(())
    }

    /// Empty rows cost as much as others: the rest moves to a smaller cache once it fits in half of this one.
    fn tidy(&mut self) -> Result<(), InferError> {
        match self.answering() {
            0 => {
                self.lane = None;
                self.seats.clear();
                Ok(())
            }
            // Whoever waits for a seat will want the empty ones.
            answering if answering * 2 <= self.seats.len() && self.reading.is_none() => {
                self.move_to(answering, self.capacity())
            }
            _ => Ok(()),
        }
    }
}

impl Seat<'_> {
    /// Chooses the next token; whether the answer goes on.
    fn choose(&mut self, logits: &[f32], on_said: OnSaid<'_>) -> bool {
        match self.try_choose(logits, on_said) {
            Ok(()) if self.row.stop.is_none() => return true,
            Ok(()) => {}
            Err(error) => {
                on_said(self.asked.ticket, self.answer, Said::Failed(error));
                return false;
            }
        }
        let (ticket, answer) = (self.asked.ticket, self.answer);
        let ended = self.row.answer(&mut |_, text| on_said(ticket, answer, Said::Text(text)));
        on_said(ticket, answer, ended.map_or_else(Said::Failed, Said::Ended));
        false
    }

    fn try_choose(&mut self, logits: &[f32], on_said: OnSaid<'_>) -> Result<(), InferError> {
        let Self { asked, answer, row } = self;
        let mut spoken = None;
        if let Some(count) = asked.alternatives {
            let best = best(logits, count).ok_or(InferError::NotFinite { row: *answer })?;
            let tell = |choice: crate::sample_token::Choice| {
                Ok(Alternative { text: row.piece(choice.token)?, logprob: choice.logprob })
            };
            let alternatives = best.into_iter().map(tell).collect::<Result<_, InferError>>()?;
            spoken = Some(Spoken { text: String::new(), logprob: 0.0, alternatives });
        }
        let before = row.text_bytes();
        row.choose(&asked.options, logits, &mut |_, text| on_said(asked.ticket, *answer, Said::Text(text)))?;
        if let Some(spoken) = spoken.filter(|_| !row.is_at_end_token()) {
            let (text, logprob) = (row.text_after(before).to_owned(), row.last_logprob);
            on_said(asked.ticket, *answer, Said::Token(Spoken { text, logprob, ..spoken }));
        }
        Ok(())
    }
}

impl fmt::Debug for Together<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Together")
            .field("reading", &self.reading.is_some())
            .field("answering", &self.answering())
            .finish_non_exhaustive()
    }
}
