package sim

import (
	"crypto/rand"
	"fmt"
	"io"
	randv2 "math/rand/v2"
	"sort"
	"strings"
	"sync"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
)

const attachPause = 200 * time.Millisecond

// Report is what a run has shown.
type Report struct {
	Seed uint64
	// Trace is a hash of the instants of all events and of all that operations
	// did: equal seeds have equal ones.
	Trace  uint64
	Events uint64
	// Virtual is how long the run took in virtual time.
	Virtual time.Duration
	// Recovery is the time from the end of all faults until every operation in
	// flight had its answer, Stall the longest time that an operation took.
	Recovery, Stall time.Duration
	Faults          map[string]int
	Operations      uint64
	Acked, Unknown  uint64
	Checked         uint64 // sectors judged
	Digests         int    // comparisons of replicas at equal applied indexes
	Live, Readable  int64  // blocks, over all nodes, at the end
}

func (r Report) String() string {
	var faults []string
	for what, n := range r.Faults {
		faults = append(faults, fmt.Sprintf("%d %s", n, what))
	}
	sort.Strings(faults)
	return fmt.Sprintf("seed %d: %d events in %v of virtual time, trace %016x\n"+
		"  faults: %s\n"+
		"  %d operations, %d writes acknowledged, %d of unknown outcome, %d sectors judged, %d digests compared\n"+
		"  longest stall %v; after the faults all operations were answered within %v; %d blocks live, %d readable",
		r.Seed, r.Events, r.Virtual, r.Trace, strings.Join(faults, ", "), r.Operations, r.Acked, r.Unknown, r.Checked, r.Digests,
		r.Stall, r.Recovery, r.Live, r.Readable)
}

// entropy makes crypto/rand.Reader, which the Raft library draws its election
// time-outs from, repeat with the seed. One run at a time may hold it.
var entropy sync.Mutex

type seeded struct{ *randv2.ChaCha8 }

func holdEntropy(seed uint64) (release func()) {
	entropy.Lock()
	was := rand.Reader
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.Reader = io.Reader(seeded{randv2.NewChaCha8(key)})
	return func() {
		rand.Reader = was
		entropy.Unlock()
	}
}

// limits of a run, in virtual time.
const (
	readyLimit    = 30 * time.Second
	recoveryLimit = 60 * time.Second
	settleLimit   = 60 * time.Second
)

// Run runs one seed to its end.
func Run(opt Options) (Report, error) {
	defer holdEntropy(opt.Seed)()
	c := newCluster(opt)
	r := Report{Seed: opt.Seed, Faults: map[string]int{}}
	err := c.run(&r)
	if c.failure != nil {
		err = c.failure // what the run ended with is its consequence
	}
	r.Events, r.Virtual = c.events, c.since(c.World.Now())
	return r, err
}

func (c *Cluster) run(r *Report) error {
	for i := range c.opt.Nodes {
		if err := c.addNode(block.NodeID(i + 1)).up(); err != nil {
			return err
		}
	}
	v, err := c.createVolume()
	if err != nil {
		return err
	}
	w := newWorkload(c, v.ID, v.SizeBytes)
	f := &faults{c: c, counts: r.Faults}
	load := c.keepLoaded(w)
	f.restart = func() { c.startGateway(v.ID, load.up) }
	f.restart()
	if !c.runUntil(readyLimit, func() bool { return load.volume != nil }) {
		return fmt.Errorf("the volume is not attached within %v", readyLimit)
	}
	f.begin()
	end := c.World.Now().Add(c.opt.Duration)
	c.runUntil(c.opt.Duration, func() bool { return w.fault != nil || c.World.Now() >= end })

	f.heal()
	healed := c.World.Now()
	load.stop()
	defer func() {
		r.Operations, r.Stall = w.ended, w.stall
		r.Acked, r.Unknown, r.Checked = w.history.Counts()
		r.Trace = c.trace.Sum64() ^ w.trace.h
	}()
	answered := func() bool { return w.fault != nil || load.volume != nil && len(w.inFlight) == 0 }
	if !c.runUntil(recoveryLimit, answered) {
		return fmt.Errorf("%v after all faults ended, %d operations have no answer (volume attached: %v)\n%s", recoveryLimit, len(w.inFlight), load.volume != nil, c.state())
	}
	r.Recovery = c.World.Now().Sub(healed)
	if w.fault != nil {
		return w.fault
	}
	verified := false
	w.verify(load.volume, func() { verified = true })
	if !c.runUntil(recoveryLimit, func() bool { return verified || w.fault != nil }) {
		return fmt.Errorf("the volume cannot be read to its end\n%s", c.state())
	}
	if w.fault != nil {
		return w.fault
	}
	return c.compare(r, v)
}

// createVolume waits for nodes and creates the volume under load.
func (c *Cluster) createVolume() (v meta.VolumeMeta, err error) {
	id, store := block.VolumeID(c.uuid()), c.Meta.Client()
	ready := func() bool {
		if v.ID.IsZero() {
			v, err = meta.CreateVolume(c.ctx, store, meta.NewVolume{ID: id, Name: "demo", SizeBytes: c.opt.VolumeBytes, Replicas: c.opt.Nodes})
			return false
		}
		v, err = meta.GetVolume(c.ctx, store, id)
		return err == nil && v.State == meta.Ready
	}
	for range int(readyLimit / attachPause) {
		if c.runFor(attachPause); ready() {
			return v, nil
		}
	}
	return v, fmt.Errorf("the volume is not ready within %v (state %s, %s): %w", readyLimit, v.State, v.Waiting, err)
}

// load keeps operations in flight while a volume is attached.
type load struct {
	c       *Cluster
	w       *workload
	volume  *gateway.Volume
	stopped bool
}

func (c *Cluster) keepLoaded(w *workload) *load { return &load{c: c, w: w} }

// up begins to work on a new attachment. What the last one had in flight has no
// answer any more: either it ended with it, or its process is dead.
func (l *load) up(v *gateway.Volume) {
	l.w.abandon()
	l.volume = v
	l.fill(v)
}

// fill tops up what is in flight, again and again.
func (l *load) fill(v *gateway.Volume) {
	if l.stopped || l.volume != v || l.w.fault != nil || l.c.gateway == nil {
		return
	}
	for len(l.w.inFlight) < l.c.opt.Writers {
		l.w.step(v)
	}
	l.c.gateway.loop.After(time.Millisecond, func() { l.fill(v) })
}

func (l *load) stop() { l.stopped = true }
