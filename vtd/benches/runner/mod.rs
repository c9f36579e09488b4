//! How a bench is run: criterion times its operations, or, with the arguments `count NAME ITERATIONS`, one of them is
//! done that often and nothing is timed: `cargo xtask bench` does so under a tool that counts instructions. `count`
//! alone names them all.
// Not every bench uses all of it.
#![allow(dead_code)]

use criterion::{Bencher, Criterion};

pub enum Runner {
    Time(Box<Criterion>),
    Count { name: String, iterations: u64 },
    Names,
}

impl Runner {
    /// As the arguments of the program say.
    pub fn new() -> Self {
        let arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "count").collect();
        match arguments.as_slice() {
            [] => Self::Time(Box::new(Criterion::default().configure_from_args())),
            [_, name, iterations, ..] => {
                Self::Count { name: name.clone(), iterations: iterations.parse().expect("a number of iterations") }
            }
            _ => Self::Names,
        }
    }

    /// The operation that `make` makes, if it is wanted. Each is a type of its own, so that it is compiled into the
    /// loop that repeats it.
    pub fn operation<O: FnMut()>(&mut self, name: &str, make: impl FnOnce() -> O) {
        match self {
            Self::Time(criterion) => {
                let (mut make, mut operation) = (Some(make), None);
                criterion.bench_function(name, |b| {
                    let operation = operation.get_or_insert_with(|| make.take().expect("it is made once")());
                    b.iter(operation);
                });
            }
            Self::Count { name: wanted, iterations } if wanted == name => {
                let mut operation = make();
                (0..*iterations).for_each(|_| operation());
            }
            Self::Count { .. } => {}
            Self::Names => println!("{name}"),
        }
    }

    /// What is only timed.
    pub fn timed(&mut self, name: &str, run: impl FnMut(&mut Bencher<'_>)) {
        if let Self::Time(criterion) = self {
            criterion.bench_function(name, run);
        }
    }

    /// The end of the report.
    pub fn finish(self) {
        if let Self::Time(criterion) = self {
            criterion.final_summary();
        }
    }
}
