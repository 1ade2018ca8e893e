package index_test

import (
	"bytes"
	"fmt"

	"pgregory.net/rapid"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// copying is a copy of the first replica's state to the second on its way.
type copying struct {
	c     *index.Copy
	view  *index.View
	job   *step
	state int
	needs []index.Need
}

const (
	copyChunks = iota // Next is due
	copyData
	copyReplace
	copyFinish
	copyFlush
)

// present are the replicas that have had the whole log.
func (m *machine) present() []seglog.ReplicaKey {
	if m.away {
		return m.keys[:1]
	}
	return m.keys[:]
}

// delivered is how many entries a replica has had.
func (m *machine) delivered(i int) int {
	if i == 1 && m.away {
		return m.caught
	}
	return len(m.log)
}

// deliver puts the payload of an entry into a replica's log.
func (m *machine) deliver(i, n int) {
	e := &m.log[n]
	if e.cmd != nil && e.cmd.Type == wire.CmdWrite {
		m.places[i][n] = m.put(m.keys[i], e.cmd.Volume, int64(e.cmd.Chunk)*block.BlocksPerChunk+int64(e.cmd.Block), e.cmd.Generation,
			block.MakeVersion(0, firstIndex+1+uint64(n)), e.cmd.CRCs)
	}
}

func (m *machine) leave() {
	if !m.away && len(m.reads) == 0 {
		m.away, m.caught = true, len(m.log)
	}
}

// merge checkpoints a replica until memory has nothing of its own.
func (m *machine) merge(i int) *index.Replica {
	r := m.db.Replica(m.keys[i])
	for m.steps[i] != nil {
		m.advance(i)
	}
	for r.Unmerged() || !r.Drained() {
		job := r.StartCheckpoint()
		job.Run()
		m.check(job.Finish())
	}
	return r
}

func (m *machine) flushNow() {
	if f := m.flush; f != nil {
		if !f.ran {
			f.job.Run()
		}
		m.check(f.job.Finish())
		m.flush = nil
	}
	f := m.db.StartFlush()
	f.Run()
	m.check(f.Finish())
}

func (m *machine) copySome(steps int) {
	for ; steps > 0 && m.away; steps-- {
		m.copyStep()
	}
}

func (m *machine) copyAll() {
	for m.away {
		m.copyStep()
	}
}

// scan gives all records of a range, in pages of a random size.
func (m *machine) scan(v *index.View, from, to []byte, take func([]index.Record) error) {
	for from != nil {
		recs, next, err := v.Scan(from, to, rapid.IntRange(1, 2000).Draw(m.t, "page"))
		m.check(err)
		if next != nil && (len(recs) == 0 || bytes.Compare(next, from) <= 0) {
			m.t.Fatalf("a scan from %x goes on at %x", from, next)
		}
		m.check(take(recs))
		from = next
	}
}

// beginCopy takes a view and compares the tables.
func (m *machine) beginCopy() {
	r := m.db.Replica(m.keys[1])
	if _, mixed := r.Installing(); !mixed {
		m.merge(1)
		m.flushNow()
		if at, _ := r.Applied(); r.DurablyApplied() != at {
			m.t.Fatalf("at %d, durable %d", at, r.DurablyApplied())
		}
	}
	p := &copying{view: m.merge(0).View(), c: r.NewCopy()}
	m.copying = p
	from, to := index.HeadRange()
	m.scan(p.view, from, to, p.c.Head)
	at, term, conf, err := p.c.HeadDone()
	m.check(err)
	if at != m.model.applied || term != firstTerm || string(conf) != "conf" {
		m.t.Fatalf("a view at %d, term %d, members %q", at, term, conf)
	}
	from, to = index.TableRange()
	m.scan(p.view, from, to, p.c.Table)
	p.c.TableDone()
	p.job = &step{job: p.c.Begin()}
}

// copyStep does a little of a copy: half a job, or what is between two.
func (m *machine) copyStep() {
	p := m.copying
	r := m.db.Replica(m.keys[1])
	switch {
	case !m.away:
	case p == nil:
		if m.steps[1] != nil {
			m.advance(1)
			return
		}
		m.beginCopy()
	case p.job != nil && !p.job.ran:
		p.job.job.Run()
		p.job.ran = true
	case p.job != nil:
		job := p.job.job
		p.job = nil
		m.check(job.Finish())
		p.needs = p.c.Needs()
	case m.steps[1] != nil:
		m.advance(1)
	case !r.Drained():
		m.start(1, false)
	case p.state == copyChunks:
		for _, id := range p.c.Next(rapid.IntRange(1, 3).Draw(m.t, "chunks")) {
			from, to := id.Range()
			m.scan(p.view, from, to, func(recs []index.Record) error { return p.c.Extents(id, recs) })
		}
		if p.state = copyFinish; !p.c.Ended() {
			p.state, p.job = copyData, &step{job: p.c.Compare()}
		}
	case p.state == copyData && len(p.needs) > 0:
		m.fetch(&p.needs[0])
		p.needs = p.needs[1:]
	case p.state == copyData:
		p.state = copyReplace
	case p.state == copyReplace:
		p.state, p.job = copyChunks, &step{job: p.c.Replace()}
	case p.state == copyFinish:
		p.state, p.job = copyFlush, &step{job: p.c.Finish()}
	default:
		m.endCopy(r)
	}
}

// fetch brings a run of blocks from where the view has it, in two pieces.
func (m *machine) fetch(n *index.Need) {
	rec := &n.Record
	at, crcs, err := m.copying.view.Place(n.Key, n.Skip, uint8(len(rec.CRCs)))
	m.check(err)
	if fmt.Sprint(crcs) != fmt.Sprint(rec.CRCs) {
		m.t.Fatalf("CRCs %x of a run, want %x", crcs, rec.CRCs)
	}
	b := int64(rec.Chunk)*block.BlocksPerChunk + int64(rec.Block)
	for i, crc := range crcs {
		holds := content{m.keys[0], rec.Volume, b + int64(i), seenBlock{rec.Generation, rec.Written, crc}}
		if l := (seglog.Location{Segment: at.Segment, Block: at.Block + uint16(i)}); m.disk[l] != holds {
			m.t.Fatalf("the view's block at %v holds %+v, want %+v", l, m.disk[l], holds)
		}
	}
	cut := rapid.IntRange(0, len(crcs)-1).Draw(m.t, "cut")
	for _, part := range [][2]int{{0, cut}, {cut, len(crcs)}} {
		if from, to := part[0], part[1]; from < to {
			l := m.put(m.keys[1], rec.Volume, b+int64(from), rec.Generation, rec.Written, crcs[from:to])
			m.copying.c.Placed(n, uint8(from), to-from, l)
		}
	}
}

// endCopy makes the copy durable, and the log goes on above it.
func (m *machine) endCopy(r *index.Replica) {
	m.flushNow()
	m.copying.view.Release()
	m.copying = nil
	at, _ := r.Applied()
	if _, mixed := r.Installing(); mixed || r.DurablyApplied() != at {
		m.t.Fatalf("after a copy: at %d, durable %d", at, r.DurablyApplied())
	}
	m.copies++
	m.away = false
	for n := int(at - firstIndex); n < len(m.log); n++ {
		m.deliver(1, n)
		m.applyTo(1, n)
	}
}
