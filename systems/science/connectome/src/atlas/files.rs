//! The atlas on disk: a model folder, with pictures, tables and graphs beside.

use std::fmt::Write;
use std::path::Path;

use kiln_core::{Error, HostTensor, ModelFolder, Result, TensorFile, write_atomic};
use kiln_data::Matrix;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::draw::escape;
use super::{Atlas, AtlasConfig, Motif};
use crate::graph::Graph;
use crate::ntf::Factors;
use crate::ntf::rank::RankScore;
use crate::score::correlation;
use crate::traces::{Animal, Span, Traces};

/// The `kind` of the model folder.
pub const KIND: &str = "connectome";

/// Everything but numbers by the thousand.
#[derive(Serialize, Deserialize)]
struct Config {
    config: AtlasConfig,
    rate: f64,
    neurons: Vec<String>,
    animals: Vec<String>,
    /// Names of every animal's behaviours.
    behaviours: Vec<Vec<String>>,
    spans: Vec<Span>,
    relative_error: f64,
    ranks: Vec<RankScore>,
    motifs: Vec<MotifConfig>,
}

#[derive(Serialize, Deserialize)]
struct MotifConfig {
    active: (usize, usize),
    communities: Vec<Option<usize>>,
    description_length: f64,
    degree_corrected: bool,
    log_odds: Option<f64>,
}

impl Atlas {
    /// The motifs' factors.
    pub fn factors(&self) -> Factors {
        let columns = |of: fn(&Motif) -> &Vec<f64>| {
            let columns: Vec<Vec<f64>> = self.motifs.iter().map(|motif| of(motif).clone()).collect();
            Matrix::from_columns(columns.first().map_or(0, Vec::len), &columns)
        };
        Factors {
            time: columns(|motif| &motif.time),
            animals: columns(|motif| &motif.animals),
            pairs: columns(|motif| &motif.pairs),
            weights: self.motifs.iter().map(|motif| motif.weight).collect(),
        }
    }

    /// Writes the model folder with `atlas.html`, `atlas.json`, and for every motif a picture, a table of its neurons and
    /// a graph for Cytoscape.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let model = ModelFolder::new(folder);
        model.create()?;
        let mut file = self.factors().to_file();
        for (w, animal) in self.traces.animals.iter().enumerate() {
            let matrix = |series: &mut dyn Iterator<Item = &Vec<f64>>| {
                let values: Vec<f32> = series.flat_map(|s| s.iter().map(|&x| x as f32)).collect();
                HostTensor::float([values.len() / self.traces.frames, self.traces.frames], values)
            };
            file.insert(format!("traces.{w}"), matrix(&mut animal.traces.iter()));
            file.insert(
                format!("behaviours.{w}"),
                matrix(&mut animal.behaviours.iter().map(|(_, series)| series)),
            );
            let neurons = animal.neurons.iter().map(|&i| i as i64).collect::<Vec<_>>();
            file.insert(format!("neurons.{w}"), HostTensor::int([neurons.len()], neurons));
        }
        file.write(&model.file("model.safetensors"))?;
        let motif = |motif: &Motif| MotifConfig {
            active: motif.active,
            communities: motif.communities.clone(),
            description_length: motif.description_length,
            degree_corrected: motif.degree_corrected,
            log_odds: motif.log_odds,
        };
        let names = |animal: &Animal| animal.behaviours.iter().map(|(name, _)| name.clone()).collect();
        model.save_config(
            KIND,
            &Config {
                config: self.config.clone(),
                rate: self.traces.rate,
                neurons: self.traces.neurons.clone(),
                animals: self.traces.animals.iter().map(|animal| animal.name.clone()).collect(),
                behaviours: self.traces.animals.iter().map(names).collect(),
                spans: self.traces.spans.clone(),
                relative_error: self.relative_error,
                ranks: self.ranks.clone(),
                motifs: self.motifs.iter().map(motif).collect(),
            },
        )?;
        self.save_atlas(folder)
    }

    /// Writes what people and other programs read.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save_atlas(&self, folder: &Path) -> Result<()> {
        let motifs = folder.join("motifs");
        std::fs::create_dir_all(&motifs).map_err(Error::io("create", &motifs))?;
        for (number, motif) in self.motifs.iter().enumerate() {
            let file = |end: &str| motifs.join(format!("motif-{}.{end}", number + 1));
            write_atomic(&file("svg"), self.motif_svg(number).as_bytes())?;
            write_atomic(&file("csv"), self.neuron_table(motif)?.as_bytes())?;
            let graph = motif.graph(&self.traces.neurons, self.config.threshold)?;
            write_atomic(&file("graphml"), graphml(&graph, &motif.communities).as_bytes())?;
        }
        let json = serde_json::to_vec_pretty(&self.to_json())
            .map_err(|e| Error::work("cannot write the atlas as JSON").caused_by(e))?;
        write_atomic(&folder.join("atlas.json"), &json)?;
        write_atomic(&folder.join("atlas.html"), self.to_html().as_bytes())
    }

    /// Reads a model folder.
    ///
    /// # Errors
    /// When it is not one of this kind, or its files do not fit together.
    pub fn load(folder: &Path) -> Result<Self> {
        let model = ModelFolder::new(folder);
        let config: Config = model.config(KIND)?;
        let place = model.file("model.safetensors");
        let wrong = |found: String| {
            Error::input(place.display(), found).hint("does config.json belong to these numbers?")
        };
        let mut file = TensorFile::read(&place)?;
        let mut animals = Vec::new();
        let mut frames = 0;
        for (w, (name, behaviours)) in config.animals.iter().zip(&config.behaviours).enumerate() {
            let neurons = file.take(&format!("neurons.{w}"))?;
            let places = neurons.as_ints().unwrap_or_default().iter().map(|&i| usize::try_from(i).ok());
            let neurons: Vec<usize> = places.flatten().filter(|&i| i < config.neurons.len()).collect();
            let traces = rows(&file.take(&format!("traces.{w}"))?);
            let series = rows(&file.take(&format!("behaviours.{w}"))?);
            frames = traces.first().map_or(0, Vec::len);
            if traces.len() != neurons.len() || series.len() != behaviours.len() {
                return Err(wrong(format!(
                    "animal {name} has {} traces of {} neurons",
                    traces.len(),
                    neurons.len()
                )));
            }
            animals.push(Animal {
                name: name.clone(),
                neurons,
                traces,
                behaviours: behaviours.iter().cloned().zip(series).collect(),
            });
        }
        let factors = Factors::from_file(file)?;
        let n = config.neurons.len();
        let fits = factors.rank() == config.motifs.len()
            && factors.time.rows == frames
            && factors.animals.rows == animals.len()
            && factors.pairs.rows == crate::tensor::pair_count(n)
            && animals.iter().all(|animal| animal.traces.iter().all(|trace| trace.len() == frames))
            && config
                .motifs
                .iter()
                .all(|m| m.communities.len() == n && m.active.0 <= m.active.1 && m.active.1 <= frames);
        if !fits {
            return Err(wrong("the factors fit neither the traces nor the motifs".into()));
        }
        let motifs = config.motifs.into_iter().enumerate().map(|(r, motif)| Motif {
            weight: factors.weights[r],
            time: factors.time.column(r),
            animals: factors.animals.column(r),
            pairs: factors.pairs.column(r),
            active: motif.active,
            communities: motif.communities,
            description_length: motif.description_length,
            degree_corrected: motif.degree_corrected,
            log_odds: motif.log_odds,
        });
        Ok(Self {
            motifs: motifs.collect(),
            config: config.config,
            traces: Traces {
                rate: config.rate,
                frames,
                neurons: config.neurons,
                animals,
                spans: config.spans,
                warnings: Vec::new(),
            },
            relative_error: config.relative_error,
            ranks: config.ranks,
        })
    }

    /// How a motif's time factor goes with each behaviour: Pearson's correlation, the mean over animals weighted by the
    /// motif's strength in them.
    pub fn behaviour_correlations(&self, motif: &Motif) -> Vec<(String, f64)> {
        let mut sums: std::collections::BTreeMap<&str, (f64, f64)> = std::collections::BTreeMap::new();
        for (animal, &share) in self.traces.animals.iter().zip(&motif.animals) {
            for (name, series) in &animal.behaviours {
                let sum = sums.entry(name).or_default();
                sum.0 += share * correlation(&motif.time, series);
                sum.1 += share;
            }
        }
        let mean = |(name, (sum, shares)): (&str, (f64, f64))| (name.to_string(), sum / shares.max(1e-300));
        sums.into_iter().map(mean).collect()
    }

    /// The atlas as other programs read it.
    pub fn to_json(&self) -> Value {
        let traces = &self.traces;
        let motif = |motif: &Motif| {
            let members = |c: Option<usize>| -> Vec<&str> {
                let of = (0..traces.neurons.len()).filter(|&i| motif.communities[i] == c);
                of.map(|i| traces.neurons[i].as_str()).collect()
            };
            let animals = traces.animals.iter().zip(&motif.animals);
            let behaviours = self.behaviour_correlations(motif).into_iter();
            json!({
                "weight": motif.weight,
                "active_s": [traces.seconds(motif.active.0), traces.seconds(motif.active.1)],
                "animals": animals.map(|(animal, share)| (animal.name.clone(), json!(share))).collect::<serde_json::Map<_, _>>(),
                "communities": (0..motif.community_count()).map(|c| members(Some(c))).collect::<Vec<_>>(),
                "not_in_motif": members(None),
                "block_model": {
                    "description_length_nats": motif.description_length,
                    "degree_corrected": motif.degree_corrected,
                    "log_odds_over_other": motif.log_odds,
                },
                "behaviour_correlations": behaviours.map(|(name, r)| (name, json!(r))).collect::<serde_json::Map<_, _>>(),
                "time_factor": motif.time,
            })
        };
        json!({
            "neurons": traces.neurons,
            "animals": traces.animals.iter().map(|animal| &animal.name).collect::<Vec<_>>(),
            "rate_hz": traces.rate,
            "frames": traces.frames,
            "spans": traces.spans,
            "relative_error": self.relative_error,
            "ranks": self.ranks,
            "motifs": self.motifs.iter().map(motif).collect::<Vec<_>>(),
        })
    }

    /// `neuron,community,strength`: a motif's neurons, the strongest of each community first.
    fn neuron_table(&self, motif: &Motif) -> Result<String> {
        let failed = |e: csv::Error| Error::work("cannot lay out the table of neurons").caused_by(e);
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(["neuron", "community", "strength"]).map_err(failed)?;
        for i in motif.order() {
            let community = motif.communities[i].map_or("none".into(), |c| (c + 1).to_string());
            let strength: f64 = (0..motif.communities.len()).map(|j| motif.between(i, j)).sum();
            writer
                .write_record([&self.traces.neurons[i], &community, &format!("{strength:.6}")])
                .map_err(failed)?;
        }
        let bytes = writer.into_inner().map_err(|e| Error::work(e.to_string()))?;
        String::from_utf8(bytes).map_err(|e| Error::work(e.to_string()))
    }
}

fn rows(tensor: &HostTensor) -> Vec<Vec<f64>> {
    let columns = tensor.shape.get(1).copied().unwrap_or(0);
    let values = tensor.as_floats().unwrap_or_default();
    values.chunks(columns.max(1)).map(|row| row.iter().map(|&x| x.into()).collect()).collect()
}

/// A graph with communities as GraphML, which Cytoscape and Gephi read.
pub fn graphml(graph: &Graph, communities: &[Option<usize>]) -> String {
    let mut text = String::from(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<graphml xmlns=\"http://graphml.graphdrawing.org/xmlns\">\n\
         <key id=\"community\" for=\"node\" attr.name=\"community\" attr.type=\"string\"/>\n\
         <key id=\"weight\" for=\"edge\" attr.name=\"weight\" attr.type=\"double\"/>\n<graph edgedefault=\"undirected\">\n",
    );
    for (name, community) in graph.nodes().iter().zip(communities) {
        let community = community.map_or("none".into(), |c| (c + 1).to_string());
        let _ =
            writeln!(text, "<node id=\"{}\"><data key=\"community\">{community}</data></node>", escape(name));
    }
    for &(i, j, weight) in graph.edges() {
        let (source, target) = (escape(&graph.nodes()[i]), escape(&graph.nodes()[j]));
        let _ = writeln!(
            text,
            "<edge source=\"{source}\" target=\"{target}\"><data key=\"weight\">{weight}</data></edge>"
        );
    }
    text + "</graph>\n</graphml>\n"
}
