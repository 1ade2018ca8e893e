package scsi

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"strings"
	"sync"

	"firn.io/firn/internal/block"
)

// Service actions of PERSISTENT RESERVE IN and OUT.
const (
	prReadKeys           = 0
	prReadReservation    = 1
	prReportCapabilities = 2
	prReadFullStatus     = 3

	prRegister       = 0
	prReserve        = 1
	prRelease        = 2
	prClear          = 3
	prPreempt        = 4
	prPreemptAbort   = 5
	prRegisterIgnore = 6
	prRegisterMove   = 7
)

// Types of persistent reservations.
const (
	typeWriteExclusive     = 1
	typeExclusive          = 3
	typeWriteExclusiveRegs = 5
	typeExclusiveRegs      = 6
	typeWriteExclusiveAll  = 7
	typeExclusiveAll       = 8
)

func validType(t byte) bool {
	switch t {
	case typeWriteExclusive, typeExclusive, typeWriteExclusiveRegs, typeExclusiveRegs, typeWriteExclusiveAll, typeExclusiveAll:
		return true
	}
	return false
}

var persistentUsage = []byte{0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04}

// reservations are those of one unit, of both kinds. A change is durable in the
// store before it is in state, and before the command that made it is answered.
type reservations struct {
	store Store
	// change is held by the one command that changes the state.
	change sync.Mutex

	mu      sync.Mutex
	state   prState
	version int64
	// reserved is who holds the unit by RESERVE.
	reserved *Nexus
}

func loadReservations(ctx context.Context, store Store) (*reservations, error) {
	r := &reservations{store: store}
	return r, r.load(ctx)
}

func (r *reservations) load(ctx context.Context) error {
	text, version, err := r.store.Load(ctx)
	if err != nil {
		return err
	}
	state, err := decodeState(text)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state, r.version = state, version
	return nil
}

// any tells whether a command could meet a conflict.
func (r *reservations) any() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reserved != nil || r.state.Type != 0
}

func (r *reservations) nexusLost(n *Nexus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reserved == n {
		r.reserved = nil
	}
}

func (r *reservations) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reserved = nil
}

func (r *reservations) snapshot() prState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.clone()
}

// conflict tells whether a reservation of another keeps the command out (SPC-4,
// 5.12.1; SPC-2, 5.5).
func (r *reservations) conflict(n *Nexus, c *command, cdb []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reserved != nil && r.reserved != n && c.flags&spc2 == 0 {
		return true
	}
	s := &r.state
	if s.Type == 0 || c.flags&unreserved != 0 {
		return false
	}
	if c.opcode == opReserve6 || c.opcode == opReserve10 || c.opcode == opRelease6 || c.opcode == opRelease10 {
		return false // judged by themselves
	}
	id := n.identity()
	registered := s.find(id) >= 0
	if s.holds(id) || registered && (s.Type == typeWriteExclusiveRegs || s.Type == typeExclusiveRegs) {
		return false
	}
	switch s.Type {
	case typeWriteExclusive, typeWriteExclusiveRegs, typeWriteExclusiveAll:
		return c.flags&writes != 0
	}
	// START STOP UNIT with START is allowed in every case.
	return !(c.opcode == opStartStop && cdb[4]&1 != 0)
}

// reserve is RESERVE (SPC-2). Who is registered persistently is told GOOD and
// given nothing, others conflict (SPC-4, 5.12.3).
func (k *call) reserve() {
	r := k.u.res
	r.mu.Lock()
	if len(r.state.Registrations) > 0 {
		if r.state.find(k.n.identity()) < 0 {
			k.r.Status = ReservationConflict
		}
	} else {
		r.reserved = k.n
	}
	r.mu.Unlock()
	k.u.tidyNow()
}

func (k *call) release() {
	r := k.u.res
	r.mu.Lock()
	if len(r.state.Registrations) > 0 && r.state.find(k.n.identity()) < 0 {
		k.r.Status = ReservationConflict
	} else if r.reserved == k.n {
		r.reserved = nil
	}
	r.mu.Unlock()
	k.u.tidyNow()
}

func (u *Unit) tidyNow() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.tidy()
}

func (k *call) persistentIn() {
	s := k.u.res.snapshot()
	out := appendBE32(nil, s.Generation)
	out = append(out, 0, 0, 0, 0)
	switch k.cdb[1] & 0x1f {
	case prReadKeys:
		for _, r := range s.Registrations {
			out = appendBE64(out, r.Key)
		}
	case prReadReservation:
		if s.Type != 0 {
			out = appendBE64(out, s.holderKey())
			out = append(out, 0, 0, 0, 0, 0, s.Type, 0, 0)
		}
	case prReadFullStatus:
		for _, r := range s.Registrations {
			out = s.appendStatus(out, r)
		}
	case prReportCapabilities:
		const crh, atp, ptplC, tmv, ptplA = 0x10, 0x04, 0x01, 0x80, 0x01
		out = []byte{0, 8, ptplC, tmv, 0xea, 0x01, 0, 0}
		if s.PowerLoss {
			out[3] |= ptplA
		}
		k.answer(out, at7(k.cdb))
		return
	}
	putBE32(out[4:], uint32(len(out)-8))
	k.answer(out, at7(k.cdb))
}

func (s *prState) holderKey() uint64 {
	if i := s.find(s.Holder); i >= 0 && !s.allHold() {
		return s.Registrations[i].Key
	}
	return 0
}

// appendStatus appends a full status descriptor (SPC-4, 6.15.5).
func (s *prState) appendStatus(dst []byte, r registration) []byte {
	dst = appendBE64(dst, r.Key)
	dst = append(dst, 0, 0, 0, 0)
	if s.holds(r.identity) {
		dst = append(dst, 0x01, s.Type)
	} else {
		dst = append(dst, 0, 0)
	}
	dst = append(dst, 0, 0, 0, 0)
	dst = appendBE16(dst, r.Port)
	id := transportID(r.Initiator)
	dst = appendBE32(dst, uint32(len(id)))
	return append(dst, id...)
}

// transportID is the iSCSI TransportID of format 01b (SPC-4, 7.6.4.6).
func transportID(initiator string) []byte {
	name := initiator + "\x00"
	name += strings.Repeat("\x00", (4-len(name)%4)%4)
	id := append([]byte{0x45, 0}, appendBE16(nil, uint16(len(name)))...)
	return append(id, name...)
}

// PortName is the name of an initiator port as reservations know it.
func PortName(initiator string, isid [6]byte) string {
	return initiator + ",i,0x" + hex.EncodeToString(isid[:])
}

// parseTransportID reads a TransportID and returns the initiator that it names
// and its length. One without an ISID names no port and is refused.
func parseTransportID(p []byte) (initiator string, n int, ok bool) {
	if len(p) < 4 || p[0] != 0x45 {
		return "", 0, false
	}
	n = 4 + int(be16(p[2:]))
	if n > len(p) {
		return "", 0, false
	}
	name, _, _ := strings.Cut(string(p[4:n]), "\x00")
	return name, n, strings.Contains(name, ",i,0x")
}

// told is a unit attention that a change causes.
type told struct {
	code Code
	to   func(*Nexus) bool
}

// verdict is how a change of the state ends.
type verdict struct {
	status Status
	sense  sense
	told   []told
	abort  func(*Nexus) bool
	same   bool // nothing changed
}

func prConflict() verdict { return verdict{status: ReservationConflict} }

func prIllegal(s sense) verdict { return verdict{status: CheckCondition, sense: s} }

// persistentOut is PERSISTENT RESERVE OUT (SPC-4, 6.16).
func (k *call) persistentOut() {
	n := at5(k.cdb)
	action := int(k.cdb[1] & 0x1f)
	p := k.list(n)
	if n > maxParameterBytes || uint64(len(p)) < n || len(p) < 24 || action != prRegisterMove && action != prRegister && action != prRegisterIgnore && n != 24 {
		k.fail(illegal(ascParameterListLength))
		return
	}
	scope, kind := k.cdb[2]>>4, k.cdb[2]&0x0f
	switch action {
	case prReserve, prPreempt, prPreemptAbort, prRelease:
		if scope != 0 || !validType(kind) {
			k.fail(invalidCDB(2))
			return
		}
	}
	r := k.u.res
	r.change.Lock()
	defer r.change.Unlock()
	const maxTries = 4
	for try := 0; ; try++ {
		r.mu.Lock()
		next, version := r.state.clone(), r.version
		r.mu.Unlock()
		v := next.out(k.n, action, kind, p)
		if v.status != Good {
			k.r.Status = v.status
			if v.status == CheckCondition {
				k.fail(v.sense)
			}
			return
		}
		err := error(nil)
		if !v.same {
			err = r.save(k.ctx, next, version)
		}
		if err != nil && block.KindOf(err) == block.Busy && try < maxTries {
			if err = r.load(k.ctx); err == nil {
				continue
			}
		}
		if err != nil {
			k.failed(err, 0, true)
			return
		}
		k.u.tidyNow()
		for _, t := range v.told {
			k.u.attentionFor(t.code, t.to)
		}
		if v.abort != nil && k.u.Abort != nil {
			k.u.Abort(k.n, v.abort)
		}
		return
	}
}

func (r *reservations) save(ctx context.Context, next prState, version int64) error {
	text, err := json.Marshal(next)
	if err != nil {
		return err
	}
	// A session that ends does not end this: half a change is none.
	version, err = r.store.Save(context.WithoutCancel(ctx), text, version)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state, r.version = next, version
	return nil
}

// out judges and makes one change; p is the parameter list of at least 24 bytes.
func (s *prState) out(n *Nexus, action int, kind byte, p []byte) verdict {
	id := n.identity()
	key, serviceKey, bits := be64(p), be64(p[8:]), p[20]
	const specI, allPorts, aptpl = 0x08, 0x04, 0x01
	mine := s.find(id)
	if action == prRegister || action == prRegisterIgnore {
		if bits&specI != 0 {
			return prIllegal(invalidList(20))
		}
		if len(p) != 24 {
			return prIllegal(illegal(ascParameterListLength))
		}
		return s.register(id, action == prRegisterIgnore, key, serviceKey, bits&aptpl != 0)
	}
	if mine < 0 || s.Registrations[mine].Key != key {
		return prConflict()
	}
	switch action {
	case prReserve:
		return s.reserve(id, kind)
	case prRelease:
		return s.release(id, kind)
	case prClear:
		others := s.among(func(r registration) bool { return r.identity != id })
		s.Registrations, s.Type, s.Holder = nil, 0, identity{}
		s.Generation++
		return verdict{told: []told{{attentionReservationsClear, others}}}
	case prPreempt, prPreemptAbort:
		return s.preempt(id, kind, serviceKey, action == prPreemptAbort)
	}
	return s.move(id, serviceKey, p)
}

// among makes a test for the nexuses whose registrations match now.
func (s *prState) among(match func(registration) bool) func(*Nexus) bool {
	set := map[identity]bool{}
	for _, r := range s.Registrations {
		if match(r) {
			set[r.identity] = true
		}
	}
	return func(n *Nexus) bool { return set[n.identity()] }
}

func (s *prState) register(id identity, ignore bool, key, serviceKey uint64, aptpl bool) verdict {
	mine := s.find(id)
	if !ignore {
		if mine < 0 && key != 0 || mine >= 0 && s.Registrations[mine].Key != key {
			return prConflict()
		}
	}
	s.PowerLoss = aptpl
	switch {
	case mine < 0 && serviceKey == 0:
		return verdict{same: true}
	case mine < 0:
		if len(s.Registrations) >= maxRegistrations {
			return prIllegal(illegal(ascInsufficientRegs))
		}
		s.Registrations = append(s.Registrations, registration{id, serviceKey})
	case serviceKey == 0:
		var v verdict
		before := *s
		s.remove(mine)
		if before.Type != 0 && s.Type == 0 && before.Type >= typeWriteExclusiveRegs {
			v.told = []told{{attentionReleased, s.among(func(registration) bool { return true })}}
		}
		s.Generation++
		return v
	default:
		s.Registrations[mine].Key = serviceKey
	}
	s.Generation++
	return verdict{}
}

func (s *prState) reserve(id identity, kind byte) verdict {
	if s.Type == 0 {
		s.Type, s.Holder = kind, id
		if s.allHold() {
			s.Holder = identity{}
		}
		return verdict{}
	}
	if s.holds(id) && s.Type == kind {
		return verdict{same: true}
	}
	return prConflict()
}

func (s *prState) release(id identity, kind byte) verdict {
	if !s.holds(id) {
		return verdict{same: true}
	}
	if s.Type != kind {
		return prIllegal(illegal(ascInvalidRelease))
	}
	s.Type, s.Holder = 0, identity{}
	if kind < typeWriteExclusiveRegs {
		return verdict{}
	}
	return verdict{told: []told{{attentionReleased, s.among(func(r registration) bool { return r.identity != id })}}}
}

// preempt removes the registrations of a key, and takes their reservation over
// (SPC-4, 5.12.11.4).
func (s *prState) preempt(id identity, kind byte, key uint64, abort bool) verdict {
	everyone := key == 0 && s.allHold()
	if key == 0 && !everyone {
		return prIllegal(invalidList(8))
	}
	victim := func(r registration) bool { return r.identity != id && (everyone || r.Key == key) }
	victims := s.among(victim)
	found := false
	for _, r := range s.Registrations {
		found = found || everyone || r.Key == key
	}
	if !found {
		return prConflict()
	}
	// Does the key hold the reservation?
	takes := s.Type != 0 && (everyone || !s.allHold() && s.holderKey() == key)
	oldType := s.Type
	kept := s.Registrations[:0:0]
	for _, r := range s.Registrations {
		if !victim(r) {
			kept = append(kept, r)
		}
	}
	s.Registrations = kept
	if takes {
		s.Type, s.Holder = kind, id
		if s.allHold() {
			s.Holder = identity{}
		}
	}
	s.Generation++
	v := verdict{told: []told{{attentionPreempted, victims}}}
	if takes && oldType != kind && oldType >= typeWriteExclusiveRegs {
		v.told = append(v.told, told{attentionReleased, s.among(func(r registration) bool { return r.identity != id })})
	}
	if abort {
		v.abort = victims
	}
	return v
}

// move is REGISTER AND MOVE (SPC-4, 6.16.4): the reservation goes to another
// nexus, which it registers.
func (s *prState) move(id identity, serviceKey uint64, p []byte) verdict {
	const unreg, aptpl = 0x02, 0x01
	n := be32(p[20:])
	if len(p) < 24 || uint64(n) != uint64(len(p)-24) {
		return prIllegal(illegal(ascParameterListLength))
	}
	to, _, ok := parseTransportID(p[24:])
	if !ok {
		return prIllegal(invalidList(24))
	}
	if serviceKey == 0 {
		return prIllegal(invalidList(8))
	}
	if s.Type == 0 || !s.holds(id) || s.allHold() {
		return prConflict()
	}
	target := identity{to, be16(p[18:])}
	if target == id {
		return prIllegal(invalidList(24))
	}
	s.PowerLoss = p[17]&aptpl != 0
	if i := s.find(target); i >= 0 {
		s.Registrations[i].Key = serviceKey
	} else if len(s.Registrations) >= maxRegistrations {
		return prIllegal(illegal(ascInsufficientRegs))
	} else {
		s.Registrations = append(s.Registrations, registration{target, serviceKey})
	}
	s.Holder = target
	if p[17]&unreg != 0 {
		s.remove(s.find(id))
	}
	s.Generation++
	return verdict{}
}
