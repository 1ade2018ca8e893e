package cluster

import (
	"context"
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// Attachment is a volume attached to this process: its epoch and nonce were
// installed in every group before anybody saw it (F1). It has the methods of
// gateway.Backend, whose comment is their contract; all are called on the loop.
//
// It ends by Close, or by itself when it has found that another took the volume:
// a group's answer or a change of the owner key makes it ask the metadata store,
// and only a newer epoch there ends it. Until the store can be asked, what was
// refused waits. Losing the lease is not the end (F4): reads go to leaders only
// until the owner key stands again.
type Attachment struct {
	client *Client
	vol    meta.VolumeMeta
	owner  meta.OwnerMeta
	lease  meta.LeaseID // that the owner key was last written under

	streams []*stream // in order of vol.Groups
	layout  [][]*stream
	queries struct{ first, last *query }

	// bound is the size that operations are held to: below vol.SizeBytes while
	// the volume shrinks.
	bound   int64
	changed func()
	ended   func(error)

	over error
	// paused: no content operation is sent; a new epoch is being installed.
	paused bool
	// contested: a group has refused this epoch.
	contested  bool
	checking   bool
	checkAgain bool
	refreshing bool
	setting    *settingsChange
	draining   func() // called when an operation has ended, while shrinking
}

func newAttachment(c *Client, v meta.VolumeMeta, o meta.OwnerMeta, lease meta.LeaseID) *Attachment {
	a := &Attachment{client: c, vol: v, owner: o, lease: lease, bound: v.SizeBytes, changed: func() {}, ended: func(error) {}}
	a.lay()
	return a
}

// lay makes the streams of groups that are new in vol, and the table of chunks.
func (a *Attachment) lay() {
	byGroup := map[block.GroupID]*stream{}
	for _, s := range a.streams {
		byGroup[s.group.id] = s
	}
	for _, id := range a.vol.Groups() {
		if byGroup[id] == nil {
			byGroup[id] = newStream(a, a.client.groupAt(id))
			a.streams = append(a.streams, byGroup[id])
		}
	}
	a.layout = make([][]*stream, len(a.vol.Spans))
	for i, span := range a.vol.Spans {
		for _, id := range span {
			a.layout[i] = append(a.layout[i], byGroup[id])
		}
	}
}

// stream returns who numbers the operations on chunk c; nil beyond the layout.
func (a *Attachment) stream(c block.Chunk) *stream {
	s := int(c.Span())
	if s >= len(a.layout) {
		return nil
	}
	return a.layout[s][int(c)%len(a.layout[s])]
}

// Volume is the volume's metadata as far as known.
func (a *Attachment) Volume() meta.VolumeMeta { return a.vol }

// Owner is the attachment's epoch and nonce.
func (a *Attachment) Owner() meta.OwnerMeta { return a.owner }

// Err tells why the attachment is over; nil while it is not.
func (a *Attachment) Err() error { return a.over }

// Token is the highest version seen of the group that holds chunk c (R1).
func (a *Attachment) Token(c block.Chunk) block.Version {
	if s := a.stream(c); s != nil {
		return s.token
	}
	return 0
}

// current tells whether the owner key surely stands: only then may a replica
// other than the leader, or a cache, be believed (F4).
func (a *Attachment) current() bool {
	return a.lease != 0 && a.lease == a.client.leased()
}

// Geometry is what clients are shown.
func (a *Attachment) Geometry() block.Geometry {
	return block.Geometry{Name: a.vol.Name, ID: a.vol.ID, SizeBytes: a.bound, LogicalBlockBytes: a.vol.BlockSize,
		PreferredBytes: block.Size, MaxBytes: block.MaxEntryBytes, ReadOnly: a.vol.ReadOnly}
}

// Watch says whom to tell of changes and of the end.
func (a *Attachment) Watch(changed func(), ended func(error)) { a.changed, a.ended = changed, ended }

// command makes a content operation; nil, and done is told, if it cannot be.
// end is where its last block begins, size what it is held to.
func (a *Attachment) command(t wire.CommandType, c block.Chunk, end, size int64, done func(error)) (*operation, *stream) {
	err := a.over
	s := a.stream(c)
	if err == nil && (end >= size || s == nil) {
		err = block.Errorf(block.OutOfRange, "chunk %d is beyond the volume's %d bytes", c, size)
	}
	if err != nil {
		a.client.loop.Post(func() { done(err) })
		return nil, nil
	}
	op := a.client.newOperation()
	op.done = done
	op.req.Kind, op.req.Group = wire.ReqPropose, s.group.id
	cmd := &op.req.Command
	cmd.Type, cmd.Cluster, cmd.Volume, cmd.Generation, cmd.Chunk = t, a.client.cfg.Cluster, a.vol.ID, a.vol.Generation, c
	return op, s
}

// Write stores p from block at of chunk c on.
func (a *Attachment) Write(c block.Chunk, at block.Index, p *payload.Buf, crcs []uint32, done func(error)) {
	count := p.Len() / block.Size
	op, s := a.command(wire.CmdWrite, c, block.Offset(c, at+block.Index(count)-1), a.bound, done)
	if op == nil {
		p.Release()
		return
	}
	op.buf = p
	cmd := &op.req.Command
	cmd.Block, cmd.Count, cmd.PayloadBytes, cmd.CRCs = at, uint16(count), uint32(p.Len()), crcs
	s.begin(op)
}

// Zero makes count blocks of chunk c zero.
func (a *Attachment) Zero(c block.Chunk, at block.Index, count int, done func(error)) {
	a.zero(c, at, count, a.bound, done)
}

func (a *Attachment) zero(c block.Chunk, at block.Index, count int, size int64, done func(error)) {
	op, s := a.command(wire.CmdZero, c, block.Offset(c, at+block.Index(count)-1), size, done)
	if op == nil {
		return
	}
	op.req.Command.Block, op.req.Command.Count = at, uint16(count)
	s.begin(op)
}

// Mark makes the chunks [from, to) zero: one range marker in each group that
// holds any of them.
func (a *Attachment) Mark(from, to block.Chunk, done func(error)) {
	a.mark(from, to, a.bound, done)
}

func (a *Attachment) mark(from, to block.Chunk, size int64, done func(error)) {
	streams := a.holders(from, to)
	if streams == nil {
		_, _ = a.command(wire.CmdMark, to-1, block.MaxVolumeBytes, size, done)
		return
	}
	left, failed := len(streams), error(nil)
	part := func(err error) {
		left--
		if failed == nil {
			failed = err
		}
		if left == 0 {
			done(failed)
		}
	}
	for _, s := range streams {
		op, _ := a.command(wire.CmdMark, to-1, block.Offset(to-1, 0), size, part)
		if op == nil {
			continue
		}
		op.req.Group = s.group.id
		op.req.Command.Chunk, op.req.Command.ToChunk = from, to
		s.begin(op)
	}
}

// holders are the streams of the groups that hold any of the chunks [from, to),
// from < to; nil if the layout does not reach so far.
func (a *Attachment) holders(from, to block.Chunk) []*stream {
	var out []*stream
	for sp := from.Span(); sp <= (to - 1).Span(); sp++ {
		if int(sp) >= len(a.layout) {
			return nil
		}
		lo := max(from, block.Chunk(sp)*block.ChunksPerSpan)
		hi := min(to, (block.Chunk(sp)+1)*block.ChunksPerSpan, lo+block.Chunk(len(a.layout[sp])))
		for c := lo; c < hi; c++ {
			if s := a.stream(c); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	return out
}

// Read gives count blocks of chunk c.
func (a *Attachment) Read(ctx context.Context, c block.Chunk, at block.Index, count int, done func([]payload.Piece, error)) {
	s, err := a.readable(c)
	if err != nil {
		a.client.loop.Post(func() { done(nil, err) })
		return
	}
	q := a.client.newQuery(ctx, s)
	q.pieces = done
	q.req.Kind, q.req.Chunk, q.req.Block, q.req.Count = wire.ReqRead, c, at, uint16(count)
	q.send()
}

func (a *Attachment) readable(c block.Chunk) (*stream, error) {
	if a.over != nil {
		return nil, a.over
	}
	s := a.stream(c)
	if s == nil {
		return nil, block.Errorf(block.OutOfRange, "chunk %d is beyond the volume", c)
	}
	return s, nil
}

// piecesOf cuts the buffers of a verified answer at the borders of runs and
// buffers. It takes over the buffers' holds.
func piecesOf(dst []payload.Piece, runs []wire.Run, bufs []*payload.Buf) []payload.Piece {
	used, buf := 0, 0 // bytes of bufs[buf] that earlier pieces have
	for _, r := range runs {
		n := int(r.Count) * block.Size
		if r.State != block.Data {
			dst = append(dst, payload.Piece{Bytes: n})
			continue
		}
		for n > 0 {
			b := bufs[buf]
			k := min(n, b.Len()-used)
			dst = append(dst, payload.Piece{Bytes: k, Off: used, Buf: b})
			used, n = used+k, n-k
			if used < b.Len() {
				b.Retain() // for the next piece
				continue
			}
			buf, used = buf+1, 0
		}
	}
	return dst
}

func (a *Attachment) linkQuery(q *query) {
	q.prev, q.next = a.queries.last, nil
	if a.queries.last != nil {
		a.queries.last.next = q
	} else {
		a.queries.first = q
	}
	a.queries.last = q
}

func (a *Attachment) unlinkQuery(q *query) {
	if q.prev != nil {
		q.prev.next = q.next
	} else {
		a.queries.first = q.next
	}
	if q.next != nil {
		q.next.prev = q.prev
	} else {
		a.queries.last = q.prev
	}
}

// lost ends the attachment from this side: somebody else has the volume, or it
// is gone.
func (a *Attachment) lost(err error) {
	if a.over != nil {
		return
	}
	a.client.log.Warn("attachment is over", "volume", a.vol.Name, "epoch", a.owner.Epoch, "why", err)
	a.ended(err)
	a.end(err)
}

// end fails everything that is in flight.
func (a *Attachment) end(err error) {
	a.over = err
	c := a.client
	delete(c.attachments, a.vol.ID)
	c.attached = slices.DeleteFunc(c.attached, func(b *Attachment) bool { return a == b })
	for _, s := range a.streams {
		s.abort(err)
	}
	for q := a.queries.first; q != nil; q = a.queries.first {
		q.withdraw()
		q.finish(nil, nil, err)
	}
	if s := a.setting; s != nil {
		s.fail(err)
	}
}

// Close ends the attachment and removes the owner key; done is told when others
// can take the volume, or that the key is left to end with its lease.
func (a *Attachment) Close(done func(error)) {
	c := a.client
	if a.over != nil {
		c.loop.Post(func() { done(nil) })
		return
	}
	a.end(block.Errorf(block.Canceled, "volume %q was detached", a.vol.Name))
	c.releaseOwner(a.vol.ID, a.owner.Nonce, 0, done)
}

// releaseTries bounds the attempts to remove an owner key. None is made while
// the store does not answer: the key ends with its lease.
const releaseTries = 3

func (c *Client) releaseOwner(id block.VolumeID, nonce block.Nonce, tries int, done func(error)) {
	var err error
	ctx := c.ctx
	if c.session.Failing() {
		err := block.Errorf(block.Unavailable, "the metadata store does not answer")
		c.loop.Post(func() { done(err) })
		return
	}
	c.loop.Do(loop.Meta, func() { err = meta.ReleaseOwner(ctx, c.cfg.Store, id, nonce) }, func() {
		if err == nil || tries+1 >= releaseTries || ctx.Err() != nil {
			done(err)
			return
		}
		c.loop.After(metaRetry, func() { c.releaseOwner(id, nonce, tries+1, done) })
	})
}
