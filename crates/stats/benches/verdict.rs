#[path = "../tests/it/world.rs"]
#[allow(dead_code,unreachable_pub)]
mod world;
use world::*;
use orchestra_stats::*;
fn det(name:&str, w:&World, n:u64){
    let r=many(w,1,n); let f:Vec<f64>=r.iter().map(|x|x.failed.unwrap_or(1e9)).collect(); let b:Vec<f64>=r.iter().map(|x|x.canary_bad as f64).collect();
    let failed=r.iter().filter(|x|x.failed.is_some()).count();
    let mut o=std::collections::BTreeMap::new(); for x in &r { *o.entry(format!("{:?}",x.outcomes.last().unwrap())).or_insert(0)+=1; }
    println!("{name}: failed {failed}/{n}  time p50 {:.1} p95 {:.1}  bad p50 {} p95 {}  {:?}", quantile(f.clone(),0.5), quantile(f,0.95), quantile(b.clone(),0.5), quantile(b,0.95), o);
}
fn main(){
  for (fb,lb) in [(2.0,0.2),(2.0,0.1),(2.0,0.5),(1.0,0.2),(1e6,1e6)] { for cap in [1,2,1000] {
    let st=|mut w:World|{w.settings.failed_burst=fb;w.settings.late_burst=lb;w.settings.client_cap=cap;w};
    println!("== failed {fb} late {lb} cap {cap}");
    let mut w=st(World::steady(10.0,0.2,120.0)); w.bad.1=|_|1.0; w.clients=50; det("allbad 10rps 50 clients",&w,400);
    let mut w=st(World::steady(10.0,0.2,120.0)); w.bad.1=|_|1.0; w.clients=1000; det("allbad 10rps 1000 clients",&w,400);
    let mut w=st(World::steady(10.0,0.2,600.0)); w.bad.1=|_|1.0; w.clients=3; det("allbad 10rps 3 clients",&w,400);
    let mut w=st(World::steady(100.0,0.2,120.0)); w.bad.1=|_|0.05; det("5% 100rps",&w,400);
    let mut w=st(World::steady(1000.0,0.2,300.0)); w.bad=(|_|0.01,|_|0.02); det("2% vs 1% 1000rps",&w,200);
    let mut w=st(World::steady(100.0,0.2,1800.0)); w.stalls=Some(Stalls{every:120.0,lasts:0.5,instances:(1,4)}); det("AA stalls 100rps",&w,400);
    let mut w=st(World::steady(100.0,0.5,1800.0)); w.stalls=Some(Stalls{every:120.0,lasts:0.5,instances:(1,1)}); det("AA stalls 50% 100rps",&w,400);
    let mut w=st(World::steady(10.0,0.2,1800.0)); w.poison=Poison::OnCanary{per_second:1.0}; det("poison on canary 10rps",&w,200);
    let mut w=st(World::steady(100.0,0.2,1800.0)); w.poison=Poison::OnCanary{per_second:1.0}; w.bad=(|_|0.01,|_|0.01); det("poison on canary 100rps, 1% ",&w,200);
  }}
}
