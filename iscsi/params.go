package iscsi

import (
	"fmt"
	"strconv"
	"strings"

	"firn.io/firn/iscsi/pdu"
)

// params are what a login has agreed on (RFC 7143, section 13).
type params struct {
	headerDigest, dataDigest bool
	// sendSegment is the initiator's MaxRecvDataSegmentLength.
	sendSegment          int
	maxBurst, firstBurst int
	initialR2T           bool
	immediate            bool
	outstanding          int
}

func defaultParams() params {
	return params{sendSegment: defaultSegment, maxBurst: 262144, firstBurst: 65536, initialR2T: true, immediate: true, outstanding: 1}
}

// Values of answers that refuse (6.2).
const (
	notUnderstood = "NotUnderstood"
	irrelevant    = "Irrelevant"
	rejectValue   = "Reject"
	yes, no       = "Yes", "No"
)

// negotiate takes one operational key and returns the answer; "" means that none
// is due. discovery sessions have no use for what is about data.
func (p *params) negotiate(key, value string, discovery bool) (string, error) {
	switch key {
	case "HeaderDigest":
		return pickDigest(value, &p.headerDigest)
	case "DataDigest":
		return pickDigest(value, &p.dataDigest)
	case "MaxRecvDataSegmentLength":
		n, err := number(key, value, 512, 1<<24-1)
		if err != nil {
			return "", err
		}
		p.sendSegment = min(n, ourMaxBurst)
		return strconv.Itoa(ourRecvSegment), nil
	case "MaxConnections", "ErrorRecoveryLevel", "DefaultTime2Wait", "DefaultTime2Retain":
		return sessionKey(key, value)
	case "MaxBurstLength", "FirstBurstLength", "MaxOutstandingR2T", "InitialR2T", "ImmediateData", "DataPDUInOrder", "DataSequenceInOrder":
		if discovery {
			return irrelevant, nil
		}
		return p.dataKey(key, value)
	case "OFMarker", "IFMarker":
		return no, nil
	case "OFMarkInt", "IFMarkInt":
		return irrelevant, nil
	case "TaskReporting":
		return choose(value, "RFC3720"), nil
	case "iSCSIProtocolLevel":
		n, err := number(key, value, 0, 31)
		if err != nil {
			return "", err
		}
		return strconv.Itoa(min(n, 1)), nil
	case "InitiatorAlias":
		return "", nil
	}
	return notUnderstood, nil
}

// sessionKey negotiates the keys about what this target does not have: more connections,
// recovery, waiting.
func sessionKey(key, value string) (string, error) {
	limit, ours := 65535, 1
	switch key {
	case "ErrorRecoveryLevel":
		limit, ours = 2, 0
	case "DefaultTime2Wait":
		limit, ours = 3600, 2
	case "DefaultTime2Retain":
		limit, ours = 3600, 0
	}
	n, err := number(key, value, 0, limit)
	if err != nil {
		return "", err
	}
	if key == "DefaultTime2Wait" {
		return strconv.Itoa(max(n, ours)), nil
	}
	return strconv.Itoa(min(n, ours)), nil
}

func (p *params) dataKey(key, value string) (string, error) {
	switch key {
	case "MaxBurstLength", "FirstBurstLength":
		n, err := number(key, value, 512, 1<<24-1)
		if err != nil {
			return "", err
		}
		if key == "MaxBurstLength" {
			p.maxBurst = min(n, ourMaxBurst)
			return strconv.Itoa(p.maxBurst), nil
		}
		p.firstBurst = min(n, ourFirstBurst)
		return strconv.Itoa(p.firstBurst), nil
	case "MaxOutstandingR2T":
		n, err := number(key, value, 1, 65535)
		if err != nil {
			return "", err
		}
		p.outstanding = min(n, ourOutstanding)
		return strconv.Itoa(p.outstanding), nil
	}
	b, err := boolean(key, value)
	if err != nil {
		return "", err
	}
	switch key {
	case "InitialR2T": // or: we do not need it
		p.initialR2T = b
	case "ImmediateData": // and: we take it
		p.immediate = b
	default: // in order, always
		b = true
	}
	if b {
		return yes, nil
	}
	return no, nil
}

func pickDigest(value string, on *bool) (string, error) {
	v := choose(value, "CRC32C", "None")
	// The initiator's order decides.
	for _, offer := range strings.Split(value, ",") {
		if offer == "None" || offer == "CRC32C" {
			v = offer
			break
		}
	}
	*on = v == "CRC32C"
	return v, nil
}

// choose returns the first of ours that the list holds, or Reject.
func choose(list string, ours ...string) string {
	offers := strings.Split(list, ",")
	for _, o := range ours {
		for _, offer := range offers {
			if offer == o {
				return o
			}
		}
	}
	return rejectValue
}

func number(key, value string, low, high int) (int, error) {
	n, err := pdu.ParseNumber(value)
	if err != nil {
		return 0, fmt.Errorf("iscsi: %s: %w", key, err)
	}
	if int64(n) < int64(low) || int64(n) > int64(high) {
		return 0, fmt.Errorf("iscsi: %s=%s is not within %d..%d", key, value, low, high)
	}
	return int(n), nil
}

func boolean(key, value string) (bool, error) {
	switch value {
	case yes:
		return true, nil
	case no:
		return false, nil
	}
	return false, fmt.Errorf("iscsi: %s=%.20s is neither Yes nor No", key, value)
}
