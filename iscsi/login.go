package iscsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi/pdu"
)

// Status of a login response: class and detail (RFC 7143, 11.13.5).
type loginStatus uint16

const (
	loginOK            loginStatus = 0x0000
	loginInitiator     loginStatus = 0x0200
	loginAuth          loginStatus = 0x0201
	loginForbidden     loginStatus = 0x0202
	loginNotFound      loginStatus = 0x0203
	loginVersion       loginStatus = 0x0205
	loginTooMany       loginStatus = 0x0206
	loginMissing       loginStatus = 0x0207
	loginSessionType   loginStatus = 0x0209
	loginNoSession     loginStatus = 0x020a
	loginInvalid       loginStatus = 0x020b
	loginTargetError   loginStatus = 0x0300
	loginUnavailable   loginStatus = 0x0301
	loginOutOfResource loginStatus = 0x0302
)

// loginError ends a login with a status.
type loginError struct {
	status loginStatus
	err    error
}

func (e *loginError) Error() string { return e.err.Error() }

func (e *loginError) Unwrap() error { return e.err }

func refuse(s loginStatus, format string, args ...any) error {
	return &loginError{s, fmt.Errorf("iscsi: "+format, args...)}
}

// statusOf tells an initiator why entering a target failed.
func statusOf(err error) loginStatus {
	var l *loginError
	switch {
	case errors.As(err, &l):
		return l.status
	case errors.Is(err, errAuthentication):
		return loginAuth
	}
	switch block.KindOf(err) {
	case block.NotFound:
		return loginNotFound
	case block.Denied:
		return loginForbidden
	case block.Busy, block.Unavailable, block.Canceled, block.Fenced:
		return loginUnavailable
	case block.Internal:
		return loginTargetError
	}
	return loginInitiator
}

// Stages of a login.
const (
	stageSecurity    = 0
	stageOperational = 1
	stageFull        = 3
)

// maxLoginText bounds the keys of one login request over all its PDUs.
const maxLoginText = 64 << 10

// maxLoginRounds bounds the requests of one login.
const maxLoginRounds = 64

// login is the negotiation at the head of a connection.
type login struct {
	c         *conn
	p         params
	initiator string
	alias     string
	target    string
	discovery bool
	isid      [6]byte
	tsih, cid uint16
	stage     int
	first     bool
	access    Access
	auth      chap
	// secure is set once the security stage needs nothing more.
	secure, known bool
	seen          map[string]bool
	text          []byte
	itt           uint32
	cmdSN         uint32
}

// run negotiates until the full feature phase. It has answered, also an error.
func (l *login) run(ctx context.Context) error {
	l.p, l.first, l.seen = defaultParams(), true, map[string]bool{}
	for round := 0; ; round++ {
		h, data, err := l.c.readLogin()
		if err != nil {
			return err
		}
		if round == maxLoginRounds {
			err = refuse(loginInitiator, "more than %d login requests", maxLoginRounds)
		}
		var final bool
		if err == nil {
			final, err = l.request(ctx, h, data)
		}
		if err != nil {
			l.answer(h, h.Flags()&0x0c, nil, statusOf(err))
			return err
		}
		if final {
			return nil
		}
	}
}

// answer sends a login response; byte1 are its flags and stages.
func (l *login) answer(req *pdu.Header, byte1 byte, text []byte, status loginStatus) {
	var h pdu.Header
	h.SetOpcode(pdu.LoginRsp)
	h[1] = byte1
	copy(h[8:14], req[8:14])
	binary.BigEndian.PutUint16(h[14:], l.tsih)
	h.SetWord(pdu.AtITT, req.ITT())
	binary.BigEndian.PutUint16(h[36:], uint16(status))
	cmdSN := req.Word(pdu.AtCmdSN)
	l.c.out.window = func() (uint32, uint32) { return cmdSN, cmdSN }
	l.c.out.send(&h, text, takesStatSN, nil)
}

// request takes one login PDU and, if it ends the negotiation, enters the target.
func (l *login) request(ctx context.Context, h *pdu.Header, data []byte) (final bool, err error) {
	if err := l.check(h); err != nil {
		return false, err
	}
	if len(l.text)+len(data) > maxLoginText {
		return false, refuse(loginInitiator, "more than %d bytes of login text", maxLoginText)
	}
	l.text = append(l.text, data...)
	if h.Has(pdu.Continue) {
		if h.Has(pdu.Transit) {
			return false, refuse(loginInitiator, "a login request has both T and C")
		}
		l.answer(h, h.Flags()&0x0c, nil, loginOK)
		return false, nil
	}
	pairs, err := pdu.ParseText(l.text)
	l.text = l.text[:0]
	if err != nil {
		return false, refuse(loginInitiator, "%w", err)
	}
	keys := map[string]string{}
	for _, p := range pairs {
		if _, twice := keys[p.Key]; twice {
			return false, refuse(loginInitiator, "key %s comes twice", p.Key)
		}
		keys[p.Key] = p.Value
	}
	var out []pdu.Pair
	if l.first {
		if out, err = l.declare(ctx, keys); err != nil {
			return false, err
		}
	}
	stage, next := int(h.Flags()>>2&3), int(h.Flags()&3)
	more, err := l.keys(stage, pairs, keys)
	if err != nil {
		return false, err
	}
	out = append(out, more...)
	transit := h.Has(pdu.Transit)
	if transit && stage == stageSecurity && !l.secure {
		transit = false // something is still due
	}
	if transit && next == stageFull && !l.secure {
		return false, refuse(loginAuth, "the initiator did not authenticate: %w", errAuthentication)
	}
	byte1 := h.Flags() & 0x0c
	if transit {
		byte1 |= pdu.Transit | byte(next)
		if l.stage = next; next == stageFull {
			return true, l.enter(ctx, h, byte1, out)
		}
	}
	l.answer(h, byte1, encode(out), loginOK)
	return false, nil
}

func encode(pairs []pdu.Pair) (text []byte) {
	for _, p := range pairs {
		text = pdu.AppendText(text, p.Key, p.Value)
	}
	return text
}

// check compares a login PDU with the ones before.
func (l *login) check(h *pdu.Header) error {
	stage, next := int(h.Flags()>>2&3), int(h.Flags()&3)
	if h[3] != 0 {
		return refuse(loginVersion, "version %d is the least that the initiator speaks", h[3])
	}
	cid := uint16(h.Word(pdu.AtCID) >> 16)
	if l.first && l.itt == 0 && l.cmdSN == 0 && len(l.text) == 0 {
		copy(l.isid[:], h[8:14])
		l.tsih, l.cid, l.itt, l.cmdSN, l.stage = binary.BigEndian.Uint16(h[14:]), cid, h.ITT(), h.Word(pdu.AtCmdSN), stage
	} else if l.isid != [6]byte(h[8:14]) || l.cid != cid || l.itt != h.ITT() {
		return refuse(loginInitiator, "a login request is of another login")
	}
	if stage == 2 || stage == stageFull || stage != l.stage {
		return refuse(loginInvalid, "login stage %d, expected %d", stage, l.stage)
	}
	if h.Has(pdu.Transit) && (next == 2 || next <= stage) {
		return refuse(loginInvalid, "login stage %d after %d", next, stage)
	}
	return nil
}

// declare takes what the first request of a connection must say.
func (l *login) declare(ctx context.Context, keys map[string]string) ([]pdu.Pair, error) {
	l.first = false
	l.initiator, l.target = strings.ToLower(keys["InitiatorName"]), strings.ToLower(keys["TargetName"])
	if l.initiator == "" {
		return nil, refuse(loginMissing, "InitiatorName is missing")
	}
	if len(l.initiator) > 223 {
		return nil, refuse(loginInitiator, "InitiatorName has %d bytes, at most 223 are allowed", len(l.initiator))
	}
	switch keys["SessionType"] {
	case "Discovery":
		l.discovery, l.target = true, ""
	case "", "Normal":
		if l.target == "" {
			return nil, refuse(loginMissing, "TargetName is missing")
		}
	default:
		return nil, refuse(loginSessionType, "SessionType=%.20s", keys["SessionType"])
	}
	var err error
	l.access, err = l.c.s.targets.Access(ctx, l.target, l.who())
	if err != nil {
		return nil, err
	}
	l.auth.access = l.access
	l.known = len(l.access.Accounts) == 0
	// Nobody needs to authenticate: a login may begin with operational keys.
	l.secure = l.known
	if l.discovery {
		return nil, nil
	}
	return []pdu.Pair{{Key: "TargetPortalGroupTag", Value: strconv.Itoa(int(l.c.s.opt.Tag))}}, nil
}

func (l *login) who() Initiator { return Initiator{Name: l.initiator, Addr: l.c.addr} }

// securityKeys belong to the security stage.
var securityKeys = map[string]bool{"AuthMethod": true, "CHAP_A": true, "CHAP_N": true, "CHAP_R": true, "CHAP_I": true, "CHAP_C": true}

// keys answers the keys of a request.
func (l *login) keys(stage int, pairs []pdu.Pair, values map[string]string) ([]pdu.Pair, error) {
	var out []pdu.Pair
	if stage == stageSecurity {
		more, err := l.security(values)
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	for _, p := range pairs {
		switch {
		case p.Key == "InitiatorName" || p.Key == "TargetName" || p.Key == "SessionType":
			continue
		case securityKeys[p.Key]:
			if stage != stageSecurity {
				return nil, refuse(loginInitiator, "%s in the operational stage", p.Key)
			}
			continue
		case p.Value == notUnderstood || p.Value == rejectValue || p.Value == irrelevant:
			continue
		case l.seen[p.Key]:
			return nil, refuse(loginInitiator, "%s is negotiated twice", p.Key)
		}
		l.seen[p.Key] = true
		answer, err := l.p.negotiate(p.Key, p.Value, l.discovery)
		if err != nil {
			return nil, refuse(loginInitiator, "%w", err)
		}
		if answer != "" {
			out = append(out, pdu.Pair{Key: p.Key, Value: answer})
		}
	}
	return out, nil
}

// security answers the keys of the security stage.
func (l *login) security(keys map[string]string) ([]pdu.Pair, error) {
	if method := keys["AuthMethod"]; method != "" {
		if l.known {
			if choose(method, "None") != "None" {
				return nil, refuse(loginAuth, "the initiator insists on %.40q, and the target knows no accounts: %w", method, errAuthentication)
			}
			return []pdu.Pair{{Key: "AuthMethod", Value: "None"}}, nil
		}
		if choose(method, "CHAP") != "CHAP" {
			return nil, refuse(loginAuth, "the initiator offers %.40q, CHAP is needed: %w", method, errAuthentication)
		}
		return []pdu.Pair{{Key: "AuthMethod", Value: "CHAP"}}, nil
	}
	switch {
	case keys["CHAP_A"] != "" && !l.known && l.auth.hash == nil:
		out, err := l.auth.begin(keys["CHAP_A"])
		if err != nil {
			return nil, refuse(loginAuth, "%w", err)
		}
		return out, nil
	case keys["CHAP_R"] != "" && l.auth.hash != nil && !l.auth.done:
		out, err := l.auth.finish(keys)
		if err != nil {
			return nil, refuse(loginAuth, "%w", err)
		}
		l.known, l.secure = true, true
		return out, nil
	case keys["CHAP_A"] != "" || keys["CHAP_R"] != "":
		return nil, refuse(loginAuth, "CHAP keys out of order: %w", errAuthentication)
	}
	return nil, nil
}

// enter opens the target and answers the last request of the login.
func (l *login) enter(ctx context.Context, h *pdu.Header, byte1 byte, out []pdu.Pair) error {
	s, err := l.c.s.newSession(ctx, l)
	if err != nil {
		return err
	}
	l.tsih = s.tsih
	// The initiator learns what we take, if it did not ask.
	if !l.seen["MaxRecvDataSegmentLength"] {
		out = append(out, pdu.Pair{Key: "MaxRecvDataSegmentLength", Value: strconv.Itoa(ourRecvSegment)})
	}
	l.answer(h, byte1, encode(out), loginOK)
	return nil
}
