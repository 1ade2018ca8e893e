package raftgroup_test

import (
	"context"
	crand "crypto/rand"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/sim"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// disk is what survives a crash of one replica: its log and its last checkpoint.
type disk struct {
	first     uint64 // index of ents[0]
	firstTerm uint64 // of first-1
	ents      []raftgroup.LogEntry
	hard      raftgroup.HardState

	checkpoint machine
}

func newDisk(conf []byte) *disk {
	return &disk{
		first: raftgroup.InitialIndex + 1, firstTerm: raftgroup.InitialTerm,
		hard:       raftgroup.HardState{Term: raftgroup.InitialTerm, Commit: raftgroup.InitialIndex},
		checkpoint: machine{applied: raftgroup.EntryID{Index: raftgroup.InitialIndex, Term: raftgroup.InitialTerm}, conf: conf},
	}
}

func (d *disk) write(w raftgroup.LogWrite) {
	if t := w.Truncate; t != nil {
		last := d.first + uint64(len(d.ents)) - 1
		if t.Index >= d.first-1 && t.Index <= last && d.term(t.Index) == t.Term {
			d.ents = slices.Clone(d.ents[t.Index+1-d.first:])
		} else {
			d.ents = nil
		}
		d.first, d.firstTerm = t.Index+1, t.Term
	}
	for _, e := range w.Entries {
		if e.Index < d.first || e.Index > d.first+uint64(len(d.ents)) {
			panic(fmt.Sprintf("entry %d leaves a gap after %d", e.Index, d.first+uint64(len(d.ents))-1))
		}
		d.ents = append(d.ents[:e.Index-d.first:e.Index-d.first], e)
	}
	if w.HardState != nil {
		d.hard = *w.HardState
	}
}

func (d *disk) term(i uint64) uint64 {
	if i == d.first-1 {
		return d.firstTerm
	}
	return d.ents[i-d.first].Term
}

// log is a raftgroup.Log over a disk: a view that sees writes at once, and a
// writer that makes them durable later, one at a time and in order.
type log struct {
	proc    *process
	disk    *disk // durable
	view    disk
	waiting []pendingWrite
	busy    bool // waiting[0] is on its way
	written bool // and has arrived
	stuck   bool // the disk does not answer
	fail    error
	reads   int
	rotten  bool // payloads fail their checksums
}

type pendingWrite struct {
	w    raftgroup.LogWrite
	done func(error)
}

func newLog(p *process, d *disk) *log {
	l := &log{proc: p, disk: d, view: *d}
	l.view.ents = slices.Clone(d.ents)
	return l
}

func (l *log) FirstIndex() uint64 { return l.view.first }
func (l *log) LastIndex() uint64  { return l.view.first + uint64(len(l.view.ents)) - 1 }
func (l *log) Term(i uint64) (uint64, bool) {
	if i+1 < l.view.first || i > l.LastIndex() {
		return 0, false
	}
	return l.view.term(i), true
}
func (l *log) HardState() raftgroup.HardState { return l.disk.hard }

func (l *log) Append(w raftgroup.LogWrite, done func(error)) {
	for i := range w.Entries {
		if p := w.Entries[i].Payload; p != nil {
			w.Entries[i].Payload = payload.Copy(p.Bytes())
		}
	}
	l.view.write(w)
	l.waiting = append(l.waiting, pendingWrite{w, done})
	l.pump()
}

func (l *log) pump() {
	if l.busy || l.stuck || len(l.waiting) == 0 {
		return
	}
	l.busy = true
	l.proc.loop.Do(loop.DiskWrite, func() {
		if l.fail == nil {
			l.disk.write(l.waiting[0].w)
			l.written = true
		}
	}, func() {
		p := l.waiting[0]
		l.waiting = l.waiting[1:]
		l.busy, l.written = false, false
		p.done(l.fail)
		l.pump()
	})
}

func (l *log) Read(lo, hi uint64, maxBytes int, payloads bool) ([]raftgroup.LogEntry, error) {
	l.reads++
	d := l.disk
	if l.rotten && payloads {
		return nil, block.Errorf(block.Corrupt, "entry %d fails its checksum", lo)
	}
	if lo < d.first || lo >= d.first+uint64(len(d.ents)) {
		return nil, block.Errorf(block.NotFound, "entry %d is not in the log", lo)
	}
	var out []raftgroup.LogEntry
	bytes := 0
	for _, e := range d.ents[lo-d.first:] {
		if e.Index >= hi {
			break
		}
		bytes += len(e.Data)
		if payloads && e.Payload != nil {
			bytes += e.Payload.Len()
		}
		if bytes > maxBytes && len(out) > 0 {
			break
		}
		if !payloads {
			e.Payload = nil
		} else if e.Payload != nil {
			e.Payload.Retain()
		}
		out = append(out, e)
	}
	return out, nil
}

// machine is a state machine that remembers what was applied as a running hash
// and a list of opSeqs.
type machine struct {
	applied raftgroup.EntryID
	conf    []byte
	sum     uint64
	ops     []block.OpSeq
}

func (m *machine) Applied() raftgroup.EntryID { return m.applied }
func (m *machine) Conf() []byte               { return m.conf }

func (m *machine) step(id raftgroup.EntryID) {
	if id.Index != m.applied.Index+1 {
		panic(fmt.Sprintf("entry %d applied after %d", id.Index, m.applied.Index))
	}
	m.applied = id
}

func (m *machine) Apply(id raftgroup.EntryID, c *wire.Command) (wire.ApplyResult, error) {
	m.step(id)
	h := fnv.New64a()
	fmt.Fprint(h, m.sum, id, c.OpSeq, c.CRCs)
	m.sum = h.Sum64()
	m.ops = append(m.ops, c.OpSeq)
	return wire.ApplyResult{Outcome: wire.OutcomeApplied, Version: block.MakeVersion(0, id.Index)}, nil
}
func (m *machine) ApplyEmpty(id raftgroup.EntryID)             { m.step(id) }
func (m *machine) ApplyConf(id raftgroup.EntryID, conf []byte) { m.step(id); m.conf = conf }

func (m *machine) clone() machine {
	c := *m
	c.ops = slices.Clone(m.ops)
	return c
}

// cluster is a few processes with one replica each of every group.
type cluster struct {
	t      testing.TB
	world  *loop.World
	net    *sim.Net
	groups []block.GroupID
	procs  []*process
	limits raftgroup.Limits
	opSeq  block.OpSeq
}

type process struct {
	c       *cluster
	id      block.NodeID
	life    uint64
	loop    *loop.Sim
	host    *raftgroup.Host
	network transport.Network
	out     map[block.NodeID]transport.Peer
	in      map[transport.Peer]block.NodeID
	disks   map[block.GroupID]*disk
	ids     map[block.GroupID]block.ReplicaID // of replicas made later; others have the node's number
	logs    map[block.GroupID]*log
	states  map[block.GroupID]*machine
	opened  int
	copies  int // times that a replica was filled from another one's state
	failed  []error
}

// seedCrypto makes Raft's election jitter, which it draws from crypto/rand, a
// part of the seed. Tests that use it do not run in parallel.
func seedCrypto(t testing.TB, seed uint64) {
	old := crand.Reader
	crand.Reader = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	t.Cleanup(func() { crand.Reader = old })
}

var _ io.Reader = (*rand.ChaCha8)(nil)

func newCluster(t testing.TB, seed uint64, nodes, groups int, limits raftgroup.Limits) *cluster {
	t.Helper()
	seedCrypto(t, seed)
	w := loop.NewWorld(seed)
	c := &cluster{t: t, world: w, net: sim.New(w), limits: limits}
	for g := range groups {
		c.groups = append(c.groups, block.GroupID(g+1))
	}
	for i := range nodes {
		p := &process{c: c, id: block.NodeID(i + 1), disks: make(map[block.GroupID]*disk), ids: make(map[block.GroupID]block.ReplicaID)}
		for _, g := range c.groups {
			members := make(map[block.ReplicaID]block.NodeID)
			for j := range nodes {
				members[block.ReplicaID(j+1)] = block.NodeID(j + 1)
			}
			conf := raftgroup.NewConf(members)
			p.disks[g] = newDisk(conf.Append(nil))
		}
		c.procs = append(c.procs, p)
		p.start()
	}
	return c
}

func addr(n block.NodeID) string { return fmt.Sprintf("node-%d", n) }

// start opens all replicas from their disks.
func (p *process) start() {
	c := p.c
	p.life++
	p.loop = c.world.NewLoop(nil)
	p.out, p.in = make(map[block.NodeID]transport.Peer), make(map[transport.Peer]block.NodeID)
	p.logs, p.states = make(map[block.GroupID]*log), make(map[block.GroupID]*machine)
	p.opened = 0
	p.network = c.net.Network(addr(p.id), p.loop, transport.Identity{Hello: transport.Hello{Node: p.id, Session: p.life}})
	if _, _, err := p.network.Listen(context.Background(), addr(p.id), p); err != nil {
		c.t.Fatal(err)
	}
	p.host = raftgroup.NewHost(raftgroup.Config{Node: p.id, Loop: p.loop, Sender: p, Incarnation: p.life, Limits: c.limits, Logf: logf(c.t, p.id)})
	p.loop.Post(func() {
		p.host.Start()
		for _, g := range c.groups {
			if p.disks[g] == nil {
				continue
			}
			p.logs[g] = newLog(p, p.disks[g])
			p.open(g)
		}
	})
}

func (p *process) replica(g block.GroupID) block.ReplicaID {
	if r := p.ids[g]; r != 0 {
		return r
	}
	return block.ReplicaID(p.id)
}

func (p *process) open(g block.GroupID) {
	m := p.disks[g].checkpoint.clone()
	p.states[g] = &m
	p.host.Open(raftgroup.GroupConfig{
		Group: g, Replica: p.replica(g), Log: p.logs[g], State: p.states[g],
		Behind: func(gr *raftgroup.Group, leader block.NodeID, at raftgroup.EntryID) { p.copyFrom(gr, leader, at) },
		Failed: func(_ *raftgroup.Group, err error) { p.failed = append(p.failed, err) },
	}, func(_ *raftgroup.Group, err error) {
		if err != nil {
			p.c.t.Errorf("node %d: %v", p.id, err)
		}
		p.opened++
	})
}

// copyFrom takes over the state of whoever has applied enough, after a while,
// from the leader that offered it or another.
func (p *process) copyFrom(gr *raftgroup.Group, leader block.NodeID, at raftgroup.EntryID) {
	g := gr.ID()
	if leader == p.id { // it may be dead by now: its offer was on its way
		p.c.t.Errorf("node %d is behind itself", p.id)
	}
	gr.Close()
	p.copies++
	var try func()
	try = func() {
		for _, q := range p.c.procs {
			if q != p && !q.loop.Dead() && q.states[g] != nil && q.states[g].applied.Index >= at.Index {
				p.disks[g].checkpoint = q.states[g].clone()
				p.open(g)
				return
			}
		}
		p.loop.After(100*time.Millisecond, try)
	}
	p.loop.After(time.Duration(p.loop.Rand().IntN(3000))*time.Millisecond, try)
}

func logf(t testing.TB, id block.NodeID) func(string, ...any) {
	if os.Getenv("FIRN_TEST_LOG") == "" {
		return nil
	}
	return func(f string, v ...any) { t.Logf("node %d: %s", id, fmt.Sprintf(f, v...)) }
}

// crash kills the process; a random prefix of what the log had in flight is
// durable.
func (p *process) crash() {
	p.loop.Kill()
	p.c.net.Crash(addr(p.id))
	for _, g := range p.c.groups {
		l := p.logs[g]
		if l == nil {
			continue
		}
		if l.written {
			l.waiting = l.waiting[1:]
		}
		for n := p.c.world.Rand().IntN(len(l.waiting) + 1); n > 0; n-- {
			p.disks[g].write(l.waiting[0].w)
			l.waiting = l.waiting[1:]
		}
	}
}

func (p *process) checkpoint(g block.GroupID) {
	p.disks[g].checkpoint = p.states[g].clone()
}

func (p *process) Peer(n block.NodeID) transport.Peer {
	peer := p.out[n]
	if peer == nil {
		peer = p.network.Dial(context.Background(), addr(n), p)
		p.out[n] = peer
	}
	return peer
}

func (p *process) Receive(peer transport.Peer, m transport.Message) {
	if m.Type == transport.TypeHello {
		h, err := transport.DecodeHello(m.Header)
		if err != nil {
			p.c.t.Error(err)
		}
		p.in[peer] = h.Node
		return
	}
	p.host.Receive(p.in[peer], m)
}

func (p *process) Closed(peer transport.Peer, _ error) {
	delete(p.in, peer)
	for n, o := range p.out {
		if o == peer {
			p.host.Unreachable(n)
		}
	}
}

func (c *cluster) leader(g block.GroupID) *process {
	var best *process
	var term uint64
	for _, p := range c.procs {
		if p.loop.Dead() {
			continue
		}
		if gr := p.host.Group(g); gr != nil && gr.Leading() && gr.Term() > term {
			best, term = p, gr.Term()
		}
	}
	return best
}

func (c *cluster) until(what string, limit time.Duration, cond func() bool) {
	c.t.Helper()
	if !c.world.RunUntil(limit, cond) {
		c.t.Fatalf("%s did not happen within %v", what, limit)
	}
}

func (c *cluster) elect(g block.GroupID) *process {
	c.t.Helper()
	c.until("an election", 5*time.Second, func() bool { return c.leader(g) != nil })
	return c.leader(g)
}

type outcome struct {
	result wire.ApplyResult
	status wire.Status
	opSeq  block.OpSeq
	ended  int
}

// propose sends a write of blocks blocks (0: a command without payload).
func (c *cluster) propose(p *process, g block.GroupID, blocks int) *outcome {
	o := &outcome{}
	p.loop.Post(func() { c.proposeInto(o, p, g, blocks) })
	return o
}

// proposeNow is propose for a caller that is on p's loop.
func (c *cluster) proposeNow(p *process, g block.GroupID, blocks int) *outcome {
	o := &outcome{}
	c.proposeInto(o, p, g, blocks)
	return o
}

func (c *cluster) proposeInto(o *outcome, p *process, g block.GroupID, blocks int) {
	gr := p.host.Group(g)
	if gr == nil {
		o.ended, o.status = 1, wire.StatusUnknownGroup
		return
	}
	c.opSeq++
	o.opSeq = c.opSeq
	cmd := &wire.Command{Type: wire.CmdMark, ToChunk: 1, OpSeq: c.opSeq}
	var buf *payload.Buf
	if blocks > 0 {
		buf = payload.New(blocks * block.Size)
		for i := range buf.Bytes() {
			buf.Bytes()[i] = byte(c.opSeq)
		}
		cmd = &wire.Command{Type: wire.CmdWrite, OpSeq: c.opSeq, Count: uint16(blocks), PayloadBytes: uint32(buf.Len()), CRCs: block.AppendCRCs(nil, buf.Bytes())}
	}
	gr.Propose(cmd, buf, func(r wire.ApplyResult, s wire.Status) { o.result, o.status = r, s; o.ended++ })
}

// agree waits until all live replicas applied the same.
func (c *cluster) agree(g block.GroupID) {
	c.t.Helper()
	defer func() {
		if c.t.Failed() {
			for _, p := range c.procs {
				gr := p.host.Group(g)
				if gr == nil {
					c.t.Logf("node %d: not open, %d opened", p.id, p.opened)
					continue
				}
				c.t.Logf("node %d: applied %v, committed %d, term %d, leading %v, progress %v, err %v, log %d..%d, counters %+v", p.id, gr.Applied(), gr.Committed(), gr.Term(), gr.Leading(), gr.Progress(), gr.Err(),
					p.logs[g].FirstIndex(), p.logs[g].LastIndex(), p.host.Counters())
			}
		}
	}()
	c.until(fmt.Sprintf("agreement of group %d", g), 20*time.Second, func() bool {
		var sum, applied uint64
		first := true
		for _, p := range c.procs {
			if p.loop.Dead() {
				continue
			}
			m := p.states[g]
			if m == nil || p.host.Group(g) == nil {
				return false
			}
			if !first && (m.sum != sum || m.applied.Index != applied) {
				return false
			}
			first, sum, applied = false, m.sum, m.applied.Index
		}
		return true
	})
}

// checkLogs verifies that the payloads on all disks are those of their commands.
func (c *cluster) checkLogs() {
	c.t.Helper()
	for _, p := range c.procs {
		for g, d := range p.disks {
			for _, e := range d.ents {
				if len(e.Data) == 0 || e.Data[0] == 0xff { // a change of members
					continue
				}
				var cmd wire.Command
				if err := wire.DecodeCommand(e.Data, &cmd); err != nil {
					c.t.Fatalf("node %d group %d entry %d: %v", p.id, g, e.Index, err)
				}
				if cmd.PayloadBytes == 0 {
					continue
				}
				if e.Payload == nil || !slices.Equal(block.AppendCRCs(nil, e.Payload.Bytes()), cmd.CRCs) {
					c.t.Fatalf("node %d group %d entry %d: not the payload of its command", p.id, g, e.Index)
				}
			}
		}
	}
}
