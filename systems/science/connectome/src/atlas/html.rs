//! The atlas as one page that opens from disk, without scripts and without the network.

use super::Atlas;
use super::draw::escape;
use super::panels::community_lists;

const STYLE: &str = "body{margin:0;font:16px/1.5 system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;color:#222;background:#fff}\
main{max-width:1120px;margin:0 auto;padding:2rem 1rem 4rem}h1{margin:0 0 .3rem}p{margin:.3rem 0}.faint{color:#767676}\
section{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}svg{width:100%;height:auto}\
table{border-collapse:collapse;margin-top:1rem}th,td{text-align:left;padding:.3rem 1.2rem .3rem 0;border-bottom:1px solid #ddd}\
td.n{text-align:right;font-variant-numeric:tabular-nums}a{color:#005a8e}";

impl Atlas {
    /// The whole page.
    pub fn to_html(&self) -> String {
        let traces = &self.traces;
        let mut rows = String::new();
        let mut sections = String::new();
        for (number, motif) in self.motifs.iter().enumerate() {
            let name = number + 1;
            let related =
                self.behaviour_correlations(motif).into_iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            let related =
                related.map_or(String::new(), |(name, r)| format!("{} (r = {r:.2})", escape(&name)));
            rows += &format!(
                "<tr><td><a href=\"#motif{name}\">Motif {name}</a></td><td class=\"n\">{:.3}</td><td class=\"n\">{:.1} – {:.1}</td>\
                 <td class=\"n\">{}</td><td class=\"n\">{}</td><td>{related}</td></tr>\n",
                motif.weight,
                traces.seconds(motif.active.0),
                traces.seconds(motif.active.1),
                motif.communities.iter().flatten().count(),
                motif.community_count(),
            );
            sections += &format!(
                "<section id=\"motif{name}\">\n{}{}</section>\n",
                self.motif_svg(number),
                community_lists(self, motif)
            );
        }
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Atlas of motifs</title>\n\
             <style>{STYLE}</style></head>\n<body><main>\n<h1>Atlas of motifs</h1>\n\
             <p class=\"faint\">{} animals, {} neurons, {:.0} s at {:.2} frames a second; {} motifs, relative error {:.3}. \
             A motif is a group of pairs of neurons that change together for a while in some animals; its communities are \
             the groups of a block model.</p>\n\
             <table><thead><tr><th>motif</th><th>weight</th><th>active, s</th><th>neurons</th><th>communities</th>\
             <th>closest behaviour</th></tr></thead>\n<tbody>\n{rows}</tbody></table>\n{}{sections}</main></body></html>\n",
            traces.animals.len(),
            traces.neurons.len(),
            traces.seconds(traces.frames),
            traces.rate,
            self.motifs.len(),
            self.relative_error,
            self.rank_table(),
        )
    }

    /// The ranks that were tried, where there was a choice.
    fn rank_table(&self) -> String {
        if self.ranks.is_empty() {
            return String::new();
        }
        let row = |score: &crate::ntf::rank::RankScore| {
            let chosen = if score.rank == self.motifs.len() { "chosen" } else { "" };
            format!(
                "<tr><td class=\"n\">{}</td><td class=\"n\">{:.4}</td><td class=\"n\">{:.3}</td><td>{chosen}</td></tr>\n",
                score.rank, score.relative_error, score.stability
            )
        };
        let rows: String = self.ranks.iter().map(row).collect();
        format!(
            "<table><thead><tr><th>rank</th><th>relative error</th><th>stability</th><th></th></tr></thead>\n<tbody>\n{rows}</tbody></table>\n"
        )
    }
}
