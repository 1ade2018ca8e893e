package iscsi

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"

	"firn.io/firn/iscsi/pdu"
)

// chapHashes are the CHAP algorithms by their number (RFC 7143, 13.? and IANA's
// PPP authentication algorithms), best first.
var chapHashes = []struct {
	number string
	make   func() hash.Hash
}{
	{"8", func() hash.Hash { return sha3.New256() }},
	{"7", sha256.New},
	{"6", sha1.New},
	{"5", md5.New},
}

// MinSecretBytes is how long a CHAP secret is at least (RFC 7143, 12.1.3).
const MinSecretBytes = 12

const maxChallenge = 1024

// chap is the target's side of one authentication (RFC 1994; RFC 7143, 12.1.3).
type chap struct {
	access    Access
	hash      func() hash.Hash
	id        byte
	challenge []byte
	// user is who has proved himself.
	user string
	done bool
}

var errAuthentication = errors.New("iscsi: CHAP authentication failed")

// begin answers CHAP_A.
func (c *chap) begin(offers string) ([]pdu.Pair, error) {
	var number string
	list := strings.Split(offers, ",")
	for _, h := range chapHashes {
		for _, offer := range list {
			if offer == h.number && number == "" {
				number, c.hash = h.number, h.make
			}
		}
	}
	if c.hash == nil {
		return nil, fmt.Errorf("iscsi: none of the CHAP algorithms %.40q is known", offers)
	}
	random := make([]byte, 1+c.hash().Size())
	rand.Read(random)
	c.id, c.challenge = random[0], random[1:]
	return []pdu.Pair{{Key: "CHAP_A", Value: number}, {Key: "CHAP_I", Value: strconv.Itoa(int(c.id))}, {Key: "CHAP_C", Value: pdu.FormatBinary(c.challenge)}}, nil
}

func (c *chap) response(id byte, secret string, challenge []byte) []byte {
	h := c.hash()
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil)
}

// finish checks CHAP_N and CHAP_R, and answers the initiator's own challenge.
func (c *chap) finish(keys map[string]string) ([]pdu.Pair, error) {
	got, err := pdu.ParseBinary(keys["CHAP_R"], maxChallenge)
	if err != nil {
		return nil, err
	}
	ok := 0
	for _, a := range c.access.Accounts {
		name := subtle.ConstantTimeCompare([]byte(a.Name), []byte(keys["CHAP_N"]))
		ok |= name & subtle.ConstantTimeCompare(c.response(c.id, a.Secret, c.challenge), got)
	}
	if ok != 1 {
		return nil, errAuthentication
	}
	c.user, c.done = keys["CHAP_N"], true
	if keys["CHAP_I"] == "" && keys["CHAP_C"] == "" {
		return nil, nil
	}
	if c.access.Mutual == nil {
		return nil, fmt.Errorf("iscsi: the initiator asks the target to prove itself, which has no secret for that: %w", errAuthentication)
	}
	id, err := number("CHAP_I", keys["CHAP_I"], 0, 255)
	if err != nil {
		return nil, err
	}
	challenge, err := pdu.ParseBinary(keys["CHAP_C"], maxChallenge)
	if err != nil {
		return nil, err
	}
	// Our own challenge sent back would make us compute what we asked for.
	if len(challenge) == 0 || subtle.ConstantTimeCompare(challenge, c.challenge) == 1 {
		return nil, fmt.Errorf("iscsi: the initiator reflects our challenge: %w", errAuthentication)
	}
	m := c.access.Mutual
	return []pdu.Pair{{Key: "CHAP_N", Value: m.Name}, {Key: "CHAP_R", Value: pdu.FormatBinary(c.response(byte(id), m.Secret, challenge))}}, nil
}
